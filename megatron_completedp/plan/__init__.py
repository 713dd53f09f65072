"""What a run will train with and cost, without running it. Imports neither torch nor megatron."""
