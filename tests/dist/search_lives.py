"""The search command with training that takes a fraction of a second: for tests that kill it.

`python -m tests.dist.search_lives run --config search.yaml` is `python -m
megatron_completedp.search run` but for the runs: a run sleeps, writes metrics, stops at signals as
training does, and its loss is a function of its config. Worker processes import this module too.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_completedp.config.cli import run_command
from megatron_completedp.config.load import load_config
from megatron_completedp.config.run import RunConfig
from megatron_completedp.search import objective
from megatron_completedp.search.__main__ import main
from megatron_completedp.study.points import outcome
from megatron_completedp.train.folder import CHECKPOINTS, METRICS_FILE
from megatron_completedp.train.signals import StopSignals
from tests.tiny import TINY_MODEL

STEPS = 10
#: Tests that stop a worker in the middle of a trial make it last longer.
STEP_S = float(os.environ.get("SEARCH_STEP_S", "0.02"))
#: A run whose learning rate is this many nats above the base's diverges.
CLIFF = 0.9

RUN: dict[str, Any] = {
    "run_dir": "unused",
    "hyperparams": {"lr": 0.01},
    "model": TINY_MODEL,
    "training": {"global_batch_size": 8, "train_steps": STEPS, "device": "cpu"},
    "data": {"train": ["train"], "valid": ["valid"]},
}


def loss(config: RunConfig) -> float:
    """A bowl in the logs of lr and weight decay, a cliff, and noise of the seed."""
    lr = math.log(config.hyperparams.lr / 0.01)
    decay = math.log(config.hyperparams.weight_decay / 0.1)
    if lr > CLIFF:
        return 100.0
    noise = random.Random(f"{lr} {decay} {config.seed}").gauss(0, 0.003)
    return 3 + 0.2 * (lr - 0.5) ** 2 + 0.1 * (decay + 0.5) ** 2 + noise


def train_point(
    config_file: Path, *, ranks: int, stop: Callable[[], bool]
) -> dict[str, Any] | None:
    """What `study.points.train_point` does, with a loss out of thin air."""
    assert ranks == 1
    config = load_config(config_file)
    folder = Path(config.run_dir)
    if outcome(config) is None:
        if not (folder / CHECKPOINTS).exists():
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        with StopSignals() as signals, (folder / METRICS_FILE).open("a") as metrics:
            first = objective.kept_steps(config) + 1
            for step in range(first, STEPS + 1):
                time.sleep(STEP_S)
                row = {"kind": "train", "step": step, "loss": loss(config)}
                metrics.write(json.dumps(row) + "\n")
                metrics.flush()
                if (signals.requested() or stop()) and step < STEPS:
                    (folder / CHECKPOINTS / f"step_{step:08d}").mkdir(parents=True)
                    return None
            row = {"kind": "eval", "step": STEPS, "loss": loss(config)}
            metrics.write(json.dumps(row) + "\n")
    found = outcome(config)
    assert found is not None
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return {**vars(found), "steps": STEPS, "seconds": STEPS * STEP_S}


objective.train_point = train_point

if __name__ == "__main__":
    sys.exit(run_command(main))
