"""A search in a database of its own, without training, for tests of what surrounds it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import optuna

from megatron_completedp.config.load import build
from megatron_completedp.config.run import RunConfig
from megatron_completedp.search.objective import Cost, Facts, Objective
from megatron_completedp.search.queue import Queue
from megatron_completedp.search.settings import DatabaseSettings, SearchSettings
from megatron_completedp.search.storage import connect, open_study
from megatron_completedp.train.folder import CHECKPOINTS, METRICS_FILE
from tests.tiny import TINY_MODEL

RUN: dict[str, Any] = {
    "run_dir": "unused",
    "hyperparams": {"lr": 0.01},
    "model": TINY_MODEL,
    "training": {"global_batch_size": 8, "train_steps": 10, "device": "cpu"},
    "data": {"train": ["train"], "valid": ["valid"]},
}


def settings(**changes: Any) -> SearchSettings:
    """A search of the global level; `changes` as in its YAML."""
    return build(SearchSettings, {"run": "run.yaml", "level": "global", "trials": 3, **changes})


def objective(out: Path, **changes: Any) -> Objective:
    """Its trials around RUN."""
    return Objective.of(settings(**changes), build(RunConfig, RUN), out)


def queue(
    out: Path,
    *,
    worker: str = "worker",
    trials: int = 3,
    retries: int = 2,
    database: DatabaseSettings | None = None,
    **changes: Any,
) -> Queue:
    """The queue as a worker sees it; every call is another worker. `changes` as in `settings`."""
    out.mkdir(parents=True, exist_ok=True)
    runs = objective(out, **changes)
    storage = connect(f"sqlite:///{out / 'study.db'}", database or DatabaseSettings(), out)
    return Queue(
        study=open_study(storage, "study", out, identity=runs.identity),
        storage=storage,
        sampler=optuna.samplers.RandomSampler,
        objective=runs,
        out=out,
        trials=trials,
        retries=retries,
        worker=worker,
    )


def write_run(folder: Path, steps: int, *, saved: int = 0, loss: float | None = None) -> None:
    """A run's folder after `steps` steps, a checkpoint after `saved`; ended, given a `loss`."""
    rows = [{"kind": "train", "step": step, "loss": 3.0} for step in range(1, steps + 1)]
    if loss is not None:
        rows.append({"kind": "eval", "step": steps, "loss": loss})
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / METRICS_FILE
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # The kernel's clock of files lags by some milliseconds, of which a try here takes few.
    os.utime(file, (time.time(), time.time()))
    if saved:
        (folder / CHECKPOINTS / f"step_{saved:08d}").mkdir(parents=True, exist_ok=True)


#: What a try cost.
COST = Cost(seconds=2.0, steps=4, tokens=2048, flops=1e9)


def facts(*losses: float | None) -> Facts:
    """A finished trial with these losses."""
    diverged = losses[-1] is None
    return Facts(**vars(COST), losses=losses, diverged=diverged, configs=("trials/0000.yaml",))
