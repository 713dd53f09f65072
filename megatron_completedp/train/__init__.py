"""The training loop: `torchrun -m megatron_completedp.train --config run.yaml`."""
