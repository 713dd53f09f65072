#!/usr/bin/env bash
# Train a run on this machine with 1 to 8 processes, on its GPUs or (training.device: cpu) its cores:
#
#   launch/local.sh 2 --config examples/quickstart/target.yaml --tensor-model-parallel-size 2
#
# Started again, it goes on from the newest checkpoint.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
processes=${1:-}
if [[ ! $processes =~ ^[1-8]$ ]]; then
  echo "error: the number of processes is '$processes'; expected 1 to 8:" \
    "launch/local.sh 2 --config run.yaml" >&2
  exit 2
fi
. "${COMPLETEDP_ENV:-$root/launch/env.sh}"
exec "$python" -m torch.distributed.run --standalone --nproc-per-node "$processes" \
  -m megatron_completedp.train "${@:2}"
