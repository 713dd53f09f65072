#!/usr/bin/env bash
# Lint, types and all default tests, in the environment of quickstart.sh. With arguments, pytest
# alone, with these arguments:
#   launch/test.sh                    everything that is not slow
#   launch/test.sh tests/unit -k eps
#   launch/test.sh -m slow            the rest
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
cd "$root"
export OMP_NUM_THREADS=1
if [ $# -eq 0 ]; then
  ruff check .
  ruff format --check .
  mypy
fi
# A file of tests stays on one worker, for its fixtures may start processes of their own.
python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile "$@"
