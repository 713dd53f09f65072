"""What a search has cost: FLOPs and device-seconds, by try and in all, however a try ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from optuna.trial import FrozenTrial, TrialState

from megatron_completedp.config.load import load_config
from megatron_completedp.plan.run_plan import Plan
from megatron_completedp.search.attributes import FLOPS, SECONDS, is_diverged, was_stopped

#: What became of a try, in the order in which they are listed.
ENDS = ("finished", "diverged", "pruned", "stopped", "lost", "running", "waiting")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One try of one trial."""

    end: str
    """One of ENDS."""
    flops: float
    """6 x parameters x the tokens that this try trained on."""
    device_seconds: float
    """Its seconds times its ranks: start-up, evaluation and reading of data included."""


@dataclass(frozen=True)
class Ledger:
    """Every try of a search."""

    entries: tuple[Entry, ...]

    @classmethod
    def of(cls, trials: Sequence[FrozenTrial], *, ranks: int) -> Ledger:
        """From a study's trials. A try still running costs nothing yet."""
        return cls(tuple(_entry(trial, ranks) for trial in trials))

    @property
    def flops(self) -> float:
        """Of all tries, those repeated, diverged and stopped early included."""
        return sum(entry.flops for entry in self.entries)

    @property
    def device_seconds(self) -> float:
        """Of all tries."""
        return sum(entry.device_seconds for entry in self.entries)

    def share_of(self, target: str) -> tuple[float, float]:
        """FLOPs as a part of those of the run in the YAML `target`, and these."""
        flops = Plan.of(load_config(target)).budget.flops
        return self.flops / flops, flops

    def count(self, end: str) -> int:
        """How many tries ended so."""
        return sum(entry.end == end for entry in self.entries)


def _entry(trial: FrozenTrial, ranks: int) -> Entry:
    attributes = trial.user_attrs
    return Entry(
        end=end_of(trial),
        flops=float(attributes.get(FLOPS, 0.0)),
        device_seconds=ranks * _seconds(trial),
    )


def end_of(trial: FrozenTrial) -> str:
    """Which of ENDS a trial came to."""
    if trial.state == TrialState.COMPLETE:
        return "diverged" if is_diverged(trial) else "finished"
    if trial.state == TrialState.FAIL:
        return "stopped" if was_stopped(trial) else "lost"
    return trial.state.name.lower()


def _seconds(trial: FrozenTrial) -> float:
    if SECONDS in trial.user_attrs:
        return float(trial.user_attrs[SECONDS])
    # A worker that was lost without a trace: up to when its trial was given to another.
    if trial.datetime_start and trial.datetime_complete:
        return (trial.datetime_complete - trial.datetime_start).total_seconds()
    return 0.0
