# Sourced by slurm.sbatch and slurm_array.sbatch: how a job asks SLURM about itself, and what follows.

# Of an array's task its own name: SLURM_JOB_ID is in one task of each array that of the whole array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

# srun does not take this over from sbatch. Where it is not set, a task has all cores of its job.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi

container=()
if [ -n "${COMPLETEDP_CONTAINER:-}" ]; then
  container=(--container-image="$COMPLETEDP_CONTAINER" --container-workdir="$PWD"
    --container-mounts="${COMPLETEDP_CONTAINER_MOUNTS:-$root:$root}")
fi

# Run a command of SLURM's, again if it fails: a controller that restarts must not end a run.
ask() {
  local try
  for try in 1 2 3 4; do
    "$@" && return
    echo "$1 has failed ($try of 5 tries)" >&2
    sleep 5
  done
  "$@"
}

# Queue the job again, under its number; exit with 1 where that cannot be.
requeue() {
  if ! ask scontrol requeue "$job"; then
    echo "error: SLURM did not queue job $job again, for the reason above. Nothing is lost: submit" \
      "the same again, with --requeue where the site forbids it by default, and it goes on from" \
      "what it has saved" >&2
    exit 1
  fi
}

# Leave with exit code $1 where SLURM is ending the job: a preempted one it queues again by itself, a
# cancelled one it does not, and one at its time limit it would drop.
leave_if_ending() {
  local state
  if ! state=$(ask squeue --noheader --jobs "$job" --format '%T|%r'); then
    echo "squeue does not say whether job $job is being ended; taken as not" >&2
    return
  fi
  case $state in
    RUNNING*) return ;;
    *'|TimeLimit')
      echo "job $job was ended at its time limit: it had not stopped" \
        "${TORCH_ELASTIC_SHUTDOWN_TIMEOUT} s after it was asked to. It is queued again and goes on" \
        "from what it had saved before. Give a step and a save more time: stop_lead_s of" \
        "megatron_completedp.launch, or by hand TORCH_ELASTIC_SHUTDOWN_TIMEOUT=<s> and sbatch" \
        "--signal=TERM@<s>" >&2
      requeue
      ;;
    *)
      echo "SLURM is ending job $job (${state:-it has left the queue}). Preempted, it comes back by" \
        "itself; cancelled, it does not: submit it again, and it goes on from what it has saved" >&2
      ;;
  esac
  exit "$1"
}
