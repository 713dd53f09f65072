#!/usr/bin/env bash
# From a fresh clone to a transferred run: environment, text, tokenizer, a tuned proxy, then a target
# of 2x width, 2x depth, 2x batch and 4x tokens on two processes, once with the transferred
# hyperparameters and once under `sp` with the proxy's own, and the target as a Hugging Face model.
# Started again, it resumes what is missing.
#
#   COMPLETEDP_DEVICE   cpu, or cuda, which needs two GPUs and has not been run on any yet (default: cuda
#                       where nvidia-smi lists two, else cpu)
set -euo pipefail
device=${COMPLETEDP_DEVICE:-}
case $device in
  cpu | cuda) ;;
  '')
    # Two processes need two GPUs; with fewer, all of it runs on CPU, which takes minutes as well.
    device=cpu
    if command -v nvidia-smi >/dev/null && [ "$(nvidia-smi -L | wc -l)" -ge 2 ]; then device=cuda; fi
    ;;
  *)
    echo "error: COMPLETEDP_DEVICE is '$device'; expected cpu or cuda" >&2
    exit 2
    ;;
esac
. "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
cd "$root"
export OMP_NUM_THREADS=1
runs=runs/quickstart
example=examples/quickstart

step() { printf '\n== %s\n' "$*"; }
train() { torchrun --standalone --nproc-per-node "$1" -m megatron_completedp.train \
  --training.device $device "${@:2}"; }

if [ "$device" = cuda ]; then
  echo "== training on GPUs, which has not been tested; COMPLETEDP_DEVICE=cpu trains on the CPU"
fi

step "text of this Python installation, a tokenizer trained on it, token files"
python -m megatron_completedp.data quick --out $runs/data --vocab-size 1024

step "the proxy: its hyperparameters are tuned"
train 1 --config $example/proxy.yaml

step "what the target will train with, and why"
python -m megatron_completedp.plan --config $example/target.yaml

step "the target, hyperparameters transferred from the proxy (two processes)"
train 2 --config $example/target.yaml

step "the same target under sp, with the proxy's hyperparameters as they are (two processes)"
train 2 --config $example/target.yaml --parametrization sp --run-dir $runs/target_sp

step "result"
python $example/compare.py --out $runs/losses.png \
  proxy=$runs/proxy target=$runs/target target_sp=$runs/target_sp

step "the target as a Hugging Face model, held to the checkpoint, and a sentence from it"
export HF_HUB_OFFLINE=1
[ -d $runs/hf ] || python tools/convert_checkpoint.py to-hf $runs/target --out $runs/hf
python $example/generate.py $runs/hf "Return the"

cat <<TXT

Next:
  see any number explained     python -m megatron_completedp.plan --config $example/target.yaml
  change the target            torchrun --nproc-per-node 2 -m megatron_completedp.train \\
                                 --config $example/target.yaml --num-layers 8 --run-dir runs/deeper
  train without the rules      ... --parametrization sp | mup | completep
  read what a run did          $runs/target/{plan.txt,config.yaml,metrics.jsonl}
  (activate the environment first: source ${venv#"$root"/}/bin/activate)
TXT
