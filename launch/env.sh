# Sourced by local.sh and the sbatch scripts before anything runs, on every machine that runs it: the
# place for what this cluster needs. COMPLETEDP_ENV names another file instead.
#
#   COMPLETEDP_VENV   folder of the virtual environment (default: .venv of the checkout)

# module load cuda/12.8
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# In a container, its own interpreter; it must have this package.
python=python3
if [ -z "${COMPLETEDP_CONTAINER:-}" ]; then
  python=${COMPLETEDP_VENV:-$root/.venv}/bin/python
  if [ ! -x "$python" ]; then
    echo "error: there is no $python; launch/test.sh makes the environment, or COMPLETEDP_VENV" \
      "names one that has this package" >&2
    exit 2
  fi
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Seconds that ranks may take to save when they are asked to stop, before torchrun kills them. SLURM asks
# so long before the time limit: --signal in slurm.sbatch, and both by stop_lead_s of `launch train`.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}
