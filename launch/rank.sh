#!/usr/bin/env bash
# One rank of slurm.sbatch, started by torchrun: its output goes to a file of its own.
exec "$COMPLETEDP_PYTHON" -m megatron_completedp.train "$@" >"$COMPLETEDP_LOGS/rank_$RANK.log" 2>&1
