# Sourced by quickstart.sh and test.sh: makes the virtual environment .venv at the repository's root,
# installs launch/requirements.txt and this package into it, and puts it first on PATH.
#
#   PYTHON                   interpreter to make it from (default: the first of python3.11, 3.12, ... )
#   COMPLETEDP_VENV          folder of the environment (default: .venv)
#   COMPLETEDP_TORCH_INDEX   package index for torch alone, e.g. PyTorch's own index of CPU wheels

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${COMPLETEDP_VENV:-$root/.venv}

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
    if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python 3.11 or newer with the venv module among: ${PYTHON:-python3.11 python3.12" \
    "python3.13 python3}. Install one, or name it: PYTHON=/path/to/python3.11 $0" >&2
  return 2
}

make_venv() {
  local python stamp index=()
  stamp=$(cat "$root/launch/requirements.txt" "$root/setup.py" | cksum)
  [ "$(cat "$venv/.installed" 2>/dev/null)" = "$stamp" ] && return
  python=$(find_python)
  echo "== installing into $venv with $("$python" --version) (minutes, the first time)"
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  if [ -n "${COMPLETEDP_TORCH_INDEX:-}" ]; then
    index=(--index-url "$COMPLETEDP_TORCH_INDEX")
  elif ! command -v nvidia-smi >/dev/null; then
    echo "   no NVIDIA driver here: where the default torch is a CUDA build it still runs, but it is" \
      "several GB; COMPLETEDP_TORCH_INDEX=<index of CPU wheels> gets the small one"
  fi
  local pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet)
  "${pip[@]}" "${index[@]}" "$(grep '^torch==' "$root/launch/requirements.txt")"
  "${pip[@]}" -r "$root/launch/requirements.txt"
  "${pip[@]}" --no-deps --editable "$root"
  echo "$stamp" >"$venv/.installed"
}

make_venv
export PATH="$venv/bin:$PATH"
