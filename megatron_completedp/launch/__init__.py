"""Jobs on a SLURM cluster: `python -m megatron_completedp.launch`. Imports no torch."""
