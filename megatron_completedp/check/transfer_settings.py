"""What `check transfer` is asked: a ladder of sizes, a sweep at each, and the verdict's bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from megatron_completedp.check.settings import check_values
from megatron_completedp.core.tables import PARAMETRIZATIONS, Parametrization
from megatron_completedp.errors import ConfigError

Axis = Literal["width", "depth", "batch", "duration", "joint"]
Swept = Literal["lr", "weight_decay"]

SWEPT_NAMES: dict[Swept, str] = {"lr": "learning rate", "weight_decay": "weight decay"}


@dataclass(frozen=True, kw_only=True)
class TransferSettings:
    """A ladder of sizes, the sweep at each of them, and what its optimum is held to."""

    run: str = ""
    """YAML of the base run; empty is a small one on the text of the Python installation."""
    axis: Axis = "width"
    """What grows; all else is pinned to the base run. joint is all four, the tokens twice."""
    sizes: tuple[int, ...] = (32, 128)
    """Hidden sizes, layers, sequences per step, training tokens, or multiples (joint)."""
    swept: Swept = "lr"
    """The base hyperparameter that is swept."""
    log2_multiples: tuple[float, ...] = (-2.0, -1.0, 0.0, 1.0, 2.0)
    """The sweep to begin with, as log2 of multiples of the base run's value."""
    max_added: int = 4
    """Values added, at most, to a sweep whose lowest loss is at its edge or beside a cliff."""
    seeds: tuple[int, ...] = (1, 2)
    """Each value is trained with each of these seeds (initial weights and order of the data)."""
    parametrizations: tuple[Parametrization, ...] = ("completedp", "sp")
    """Those to compare. Where they give a run the same numbers, it is trained once."""
    judged: Parametrization = "completedp"
    """The one of them that the verdict is about."""
    max_drift: float = 0.5
    """Octaves that the best value may move between any two sizes."""
    window: float = 0.1
    """Nats above the lowest loss up to which points join the parabola."""
    workers: int = 0
    """Processes that train at once; 0 is one per GPU, or per core without any."""
    ranks: int = 1
    """Processes of each single run; more than one are started with torchrun."""
    calibrate_duration: bool = False
    """Fit the duration exponent and write it into the run's YAML (axis duration, swept lr)."""

    def __post_init__(self) -> None:
        _check_choice("axis", self.axis, get_args(Axis))
        _check_choice("swept", self.swept, get_args(Swept))
        for parametrization in self.parametrizations:
            _check_choice("parametrizations", parametrization, PARAMETRIZATIONS)
        _check_choice("judged", self.judged, self.parametrizations)
        check_values("sizes", self.sizes, least=2, why="one size has nothing to drift from")
        check_values("log2_multiples", self.log2_multiples, least=3, why="a parabola needs three")
        check_values("seeds", self.seeds, least=1, why="nothing would be trained")
        for name, value, low in (
            ("sizes", min(self.sizes), 1),
            ("seeds", min(self.seeds), 0),
            ("max_added", self.max_added, 0),
            ("workers", self.workers, 0),
            ("ranks", self.ranks, 1),
        ):
            if value < low:
                raise ConfigError(f"{name} has {value}; expected at least {low}.")
        for name, number in (("max_drift", self.max_drift), ("window", self.window)):
            if not 0 < number < math.inf:
                raise ConfigError(f"{name} is {number}; expected a positive number.")
        if self.calibrate_duration and (self.axis, self.swept, self.judged) != (
            "duration",
            "lr",
            "completedp",
        ):
            raise ConfigError(
                f"calibrate_duration is on with axis {self.axis}, swept {self.swept}, judged "
                f"{self.judged}; the exponent is fitted to best learning rates under completedp "
                "at two or more durations. Set axis duration, swept lr and judged completedp."
            )
        if self.calibrate_duration and not self.run:
            raise ConfigError(
                "calibrate_duration is on without a run; name the YAML to write the exponent to."
            )


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} has {value!r}; expected one of {', '.join(choices)}.")
