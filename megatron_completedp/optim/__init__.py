"""AdamW with Complete(d)P hyperparameters. Knows tensors and numbers, nothing of Megatron."""
