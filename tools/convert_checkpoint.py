#!/usr/bin/env python
"""Checkpoints to Hugging Face models and back: {to-hf,from-hf,verify}, each with --help."""

from __future__ import annotations

import sys

from megatron_completedp.config.cli import run_command
from megatron_completedp.convert.__main__ import main

if __name__ == "__main__":
    sys.exit(run_command(main))
