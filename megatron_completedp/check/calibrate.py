"""The duration exponent p of lr ~ m_D^-p from best learning rates at two or more durations."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_completedp.check.drift import LadderResult, best_of
from megatron_completedp.check.ladder import Ladder
from megatron_completedp.data.atomic import atomic_write
from megatron_completedp.errors import CompletedPError
from megatron_completedp.study.fit import Interval, Slope, bootstrap, slope, student

#: The line of a run's YAML that holds the exponent, with its comment.
_LINE = re.compile(r"^duration_exponent:.*\n?", re.MULTILINE)


@dataclass(frozen=True)
class Exponent:
    """A fitted duration exponent; NaN where a duration has no optimum."""

    value: float
    interval: Interval
    """Over the seeds: how they move the optima, and the line with them."""
    line_interval: Interval
    """By how far the optima lie from one line (Student's t); NaN for two of them, which do not."""


def fitted_exponent(ladder: Ladder, result: LadderResult) -> Exponent:
    """The p with which the best learning rates of `result` follow m_D^-p.

    A best multiple 2^x at ratio m_D stands for the learning rate base * 2^x * m_D^-q, where q is
    what the parametrization already applies: the configured exponent under completedp, 0 under the
    others. So p = q - d x / d log2 m_D. Decay and betas followed q while x was swept; where p comes
    out far from q, a second calibration with p in the config corrects for that.
    """
    applied = 0.0
    if result.parametrization == "completedp":
        applied = ladder.base.rules.duration_exponent
    log2_durations = [math.log2(item.size) for item in result.sizes]

    def line(drawn: Sequence[int]) -> Slope:
        best = [
            best_of(item.seeds, drawn, window=ladder.settings.window).x for item in result.sizes
        ]
        return slope(log2_durations, best)

    count = len(ladder.settings.seeds)
    whole = line(range(count))
    value, freedom = applied - whole.value, len(result.sizes) - 2
    return Exponent(
        value=value,
        interval=bootstrap(count, lambda drawn: applied - line(drawn).value),
        line_interval=student(value, whole.standard_error**2, freedom),
    )


def write_exponent(path: Path, exponent: Exponent) -> str:
    """Write the exponent, its interval in a comment, into the run's YAML; what was done, in words.

    Only the one line changes, or is added at the end; the file is replaced whole. Raises
    CompletedPError, and leaves the file, for an exponent outside what the rules allow.
    """
    value = round(exponent.value, 3)
    if not 0 <= value <= 1:
        raise CompletedPError(
            f"the fitted duration exponent is {exponent.value:.3f}; expected a value in [0, 1], so "
            f"{path} was left as it is. Look at the sweeps: longer horizons, wider sweeps or more "
            "seeds are needed."
        )
    comment = "no interval: too few seeds"
    if not math.isnan(exponent.interval.low):
        comment = f"95 % over seeds {exponent.interval:.3f}"
    if not math.isnan(exponent.line_interval.low):
        comment += f", of the line {exponent.line_interval:.3f}"
    line = f"duration_exponent: {value}  # fitted by check transfer, {comment}\n"
    text = path.read_text(encoding="utf-8")
    text, found = _LINE.subn(line, text)
    if not found:
        text = text.rstrip("\n") + "\n" + line
    with atomic_write(path) as stream:
        stream.write(text.encode())
    return f"Wrote duration_exponent: {value} ({comment}) into {path}."
