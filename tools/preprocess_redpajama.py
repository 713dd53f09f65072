#!/usr/bin/env python
"""RedPajama or other text to token files: `python -m megatron_completedp.data preprocess`."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    # Only here: worker processes import this file as well, and need none of it.
    from megatron_completedp.config.cli import run_command
    from megatron_completedp.data.preprocess import main

    sys.exit(run_command(main))
