"""Early stopping: a run that has fallen behind the finished ones ends there, and its trial with it.

Off by default: what is stopped has no value, so that samplers that use values are not treated
alike, and a run that starts slowly can end well.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Any

from optuna.trial import FrozenTrial

from megatron_completedp.data.jsonl import read_whole_rows
from megatron_completedp.search.attributes import ended_well
from megatron_completedp.study.crew import POLL_S
from megatron_completedp.study.points import tidy
from megatron_completedp.train.folder import METRICS_FILE

#: Parts of a run at which it is compared; later, little is left to save.
MARKS = (0.25, 0.5, 0.75)

#: Finished trials without which there is no band.
LEAST_POOL = 8

#: Part of the whole run, before each mark, over which the training loss is averaged.
AVERAGED = 0.1


def upper_edge(pool: Sequence[float]) -> float:
    """The loss above which a run is out of the pool's band: Tukey's fence, Q3 + 1.5 (Q3 - Q1)."""
    low, _, high = statistics.quantiles(pool, n=4)
    return high + 1.5 * (high - low)


def pool_at(trials: Sequence[FrozenTrial], step: int) -> list[float]:
    """Training losses at `step` of the trials that ended well."""
    return [
        trial.intermediate_values[step]
        for trial in trials
        if ended_well(trial) and step in trial.intermediate_values
    ]


def loss_at(rows: Sequence[Mapping[str, Any]], step: int, steps: int) -> float | None:
    """Mean training loss over the AVERAGED part before `step`; None before the run is there."""
    losses = {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}
    if not losses or max(losses) < step:
        return None
    near = [value for at, value in losses.items() if step - AVERAGED * steps < at <= step]
    return statistics.fmean(near) if near else None


class Pruner:
    """Inside `with`, a thread follows a run's metrics, until the run is out of the band."""

    def __init__(self, run_dir: Path, *, steps: int, trials: Sequence[FrozenTrial]) -> None:
        self._run_dir = run_dir
        self._steps = steps
        self._trials = trials
        self._over = Event()
        self._thread = Thread(target=self._follow, name="pruner", daemon=True)
        self.losses: dict[int, float] = {}
        """Training loss by step, at the marks that the run has reached."""
        self.behind = False
        """Whether the run was out of the band at a mark, and has to stop."""

    def __enter__(self) -> Pruner:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()
        self._look()

    def tidy(self) -> None:
        """Remove what the run saved when it was stopped: it is not gone on with."""
        tidy(self._run_dir)

    def _follow(self) -> None:
        while not self.behind and not self._over.wait(POLL_S / 4):
            self.behind = self._look()

    def _look(self) -> bool:
        """Take down the marks reached; whether the run is behind the pool at the last of them."""
        rows = read_whole_rows(self._run_dir / METRICS_FILE)
        behind = False
        for mark in MARKS:
            step = max(1, round(mark * self._steps))
            loss = loss_at(rows, step, self._steps)
            if loss is not None:
                self.losses[step] = loss
                pool = pool_at(self._trials, step)
                behind = len(pool) >= LEAST_POOL and loss > upper_edge(pool)
        return behind
