"""Complete(d)P on Megatron-Core: tune small, transfer to any width, depth, batch and duration."""

__version__ = "0.1.0"
