"""The training command, but rank 0 never comes back from its fourth step; see test_stops.py."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from megatron_completedp.config.cli import run_command
from megatron_completedp.mcore.engine import Engine
from megatron_completedp.train.__main__ import main

train_step = Engine.train_step


def hang_on_rank_zero(engine: Engine, *args: Any, **kwargs: Any) -> Any:
    """Take part in three steps."""
    if os.environ["RANK"] == "0" and engine.step == 3:
        time.sleep(3600)
    return train_step(engine, *args, **kwargs)


if __name__ == "__main__":
    Engine.train_step = hang_on_rank_zero  # type: ignore[method-assign]
    sys.exit(run_command(main))
