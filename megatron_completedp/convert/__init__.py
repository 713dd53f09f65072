"""Checkpoints to Hugging Face models and back: one table of names, generic code, and a proof."""
