"""Complete(d)P on Megatron-Core: hyperparameters that transfer across width, depth, batch and duration."""

__version__ = "0.1.0"
