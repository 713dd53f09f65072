#!/usr/bin/env bash
# The whole way as one chain of SLURM jobs: text to tokens, a ladder that says whether the learning
# rate transfers, a search at the proxy, the target with what it found, the target for transformers.
# Each job waits for the one before to succeed; where one fails, those behind it are cancelled.
#
#   examples/pipeline/submit.sh                   from a machine that can sbatch
#   SBATCH_PARTITION=cpu SBATCH_ACCOUNT=me examples/pipeline/submit.sh
#
# Sizes are tiny: minutes on two nodes with two cores each. For your own, replace the text, the YAML
# files beside this script and the numbers of nodes and tasks.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root"
. "${COMPLETEDP_ENV:-launch/env.sh}"
here=examples/pipeline out=runs/pipeline
mkdir -p "$out/logs"

# Stands for your text: that of this Python installation, and a tokenizer of it.
if [ ! -e "$out/tokenizer.model" ]; then
  "$python" -m megatron_completedp.data sample --out "$out/text" --max-mb 4
  "$python" -m megatron_completedp.data tokenizer --inputs "$out/text/train" \
    --out "$out/tokenizer.model" --vocab-size 1024
fi

# queue NAME JOB sbatch's arguments: NAME runs once JOB has succeeded; prints its number.
queue() {
  local name=$1 before=$2
  sbatch --parsable --job-name="$name" --output="$out/logs/$name-%j.log" \
    ${before:+--dependency=afterok:$before} --kill-on-invalid-dep=yes "${@:3}"
}
# A command line as a job; $python in it is that of env.sh.
line() { echo "--wrap=root='$root'; . '${COMPLETEDP_ENV:-launch/env.sh}'; $*"; }

job=$(queue preprocess "" --array=0-1 launch/slurm_array.sbatch preprocess --config $here/preprocess.yaml)
echo "preprocess  $job  (2 tasks)"
job=$(queue ladder "$job" --array=0-1 launch/slurm_array.sbatch ladder --config $here/ladder.yaml)
echo "ladder      $job  (2 tasks; fails if the best learning rate moves too far)"
job=$(queue search "$job" --array=0-1 launch/slurm_array.sbatch search --config $here/search.yaml)
echo "search      $job  (2 tasks)"
job=$(queue recipe "$job" "$(line '"$python" -m megatron_completedp.search recipe' \
  --config $here/search.yaml --to $out/recipe.yaml)")
echo "recipe      $job"
# By its comment, the run's folder, `launch status` and `launch train` know the job before it starts.
job=$(COMPLETEDP_PROCESSES=1 queue target "$job" --nodes=2 --comment="$(realpath -m $out/target)" \
  launch/slurm.sbatch --config $here/target.yaml --recipe $out/recipe.yaml)
echo "target      $job  (2 nodes; python -m megatron_completedp.launch status $out/target)"
# As in launch/quickstart.sh: a model that is there is not converted again.
job=$(queue export "$job" "$(line "[ -d $out/hf ] ||" '"$python" -m megatron_completedp.convert to-hf' \
  $out/target --out $out/hf)")
echo "export      $job  (writes $out/hf)"
