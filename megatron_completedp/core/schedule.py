"""Learning-rate schedules as functions of step / steps: their windows scale with m_S by design."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_completedp.errors import ConfigError

ScheduleKind = Literal["cosine", "linear", "wsd", "constant"]
SCHEDULE_KINDS: tuple[ScheduleKind, ...] = ("cosine", "linear", "wsd", "constant")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Shape of the learning rate over a run; each module follows it with its own peak and floor."""

    kind: ScheduleKind = "cosine"
    """cosine and linear decay to the floor; wsd holds the peak, then decays linearly."""
    warmup_fraction: float = 0.02
    """Part of the steps spent rising linearly from 0 to the peak."""
    decay_fraction: float = 0.2
    """wsd only: part of the steps, at the end, spent decaying."""
    min_lr_fraction: float = 0.1
    """Floor as a part of the peak (ignored by constant)."""

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULE_KINDS:
            raise ConfigError(
                f"schedule.kind is {self.kind!r}; expected one of {', '.join(SCHEDULE_KINDS)}."
            )
        for name in ("warmup_fraction", "decay_fraction", "min_lr_fraction"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ConfigError(f"schedule.{name} is {value}; expected a fraction in [0, 1].")
        if self.warmup_fraction >= 1:
            raise ConfigError("schedule.warmup_fraction is 1: the whole run would be warmup.")
        # The sum, not 1 - warmup: 1 - 0.32 rounds to less than 0.68.
        if self.kind == "wsd" and not (
            self.decay_fraction > 0 and self.warmup_fraction + self.decay_fraction <= 1
        ):
            raise ConfigError(
                f"schedule.decay_fraction is {self.decay_fraction} with warmup_fraction "
                f"{self.warmup_fraction}; expected more than 0 and a sum of at most 1."
            )

    def at(self, step: int, steps: int) -> float:
        """The learning rate of the update after `step` finished ones, as a part of the peak.

        `steps` is the length of the run. The first update of a run with warmup has rate 0, as in
        Megatron's OptimizerParamScheduler, which tests compare with this function.
        """
        progress = step / steps
        if progress <= self.warmup_fraction and self.warmup_fraction > 0:
            return progress / self.warmup_fraction
        if self.kind == "constant":
            return 1.0
        if self.kind == "wsd":
            start = 1 - self.decay_fraction
            fall = min(max((progress - start) / self.decay_fraction, 0.0), 1.0)
            remaining = 1 - fall
        else:
            fall = min((progress - self.warmup_fraction) / (1 - self.warmup_fraction), 1.0)
            remaining = 1 - fall if self.kind == "linear" else 0.5 * (1 + math.cos(math.pi * fall))
        return self.min_lr_fraction + (1 - self.min_lr_fraction) * remaining
