"""From JSONL text to the token files that training reads. Imports neither torch nor megatron."""
