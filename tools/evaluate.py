#!/usr/bin/env python
"""Score a Hugging Face folder on local files, offline, chance beside every score."""

from __future__ import annotations

import sys

from megatron_completedp.config.cli import run_command
from megatron_completedp.convert.evaluate import main

if __name__ == "__main__":
    sys.exit(run_command(main))
