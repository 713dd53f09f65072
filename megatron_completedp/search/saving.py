"""How many tokens a recipe saves at equal loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from megatron_completedp.study.fit import Interval, SeedCurve, mean_curve, mean_interval


@dataclass(frozen=True)
class Saving:
    """How many tokens a recipe saves at the loss that the baseline reaches."""

    level: float
    """Loss of the baseline at its reference, nats per token; not finite where it diverged."""
    reference: float
    """log2 of the tokens that the baseline needs for it."""
    needed: float
    """log2 of the tokens that the recipe needs; NaN outside of what was trained."""
    interval: Interval
    """Of the ratio, Student's over seeds; NaN where one seed has no ratio of its own."""

    @property
    def ratio(self) -> float:
        """Tokens of the baseline over those of the recipe; above 1 saves."""
        return float(2.0 ** (self.reference - self.needed))


def saving(baseline: Sequence[SeedCurve], recipe: Sequence[SeedCurve], reference: float) -> Saving:
    """The tokens saved at the loss of `baseline` after 2^reference tokens.

    The ratio is that of the mean curves. Curves are per seed, in the same order, and a seed's pair
    shares its data and initial weights: the interval is as wide, in logs, as Student's of the mean
    of the ratios that the seeds have one by one.
    """
    level = mean_curve(baseline)[reference]
    needed = log_tokens_at(mean_curve(recipe), level)
    by_seed = [
        reference - log_tokens_at(ours, theirs[reference])
        for theirs, ours in zip(baseline, recipe, strict=True)
    ]
    own = mean_interval(by_seed)
    shift = reference - needed - fmean(by_seed)
    return Saving(
        level, reference, needed, Interval(2.0 ** (own.low + shift), 2.0 ** (own.high + shift))
    )


def log_tokens_at(curve: SeedCurve, level: float) -> float:
    """log2 of the tokens after which `curve` first reaches `level`, linear between its points.

    NaN where it starts below or never gets there: nothing is extrapolated.
    """
    points = sorted(curve.items())
    if points[0][1] < level:
        return math.nan
    for (x0, y0), (x1, y1) in pairwise(points):
        if y1 <= level <= y0 and math.isfinite(y0):
            return x0 if y0 == y1 else x0 + (y0 - level) / (y0 - y1) * (x1 - x0)
    return math.nan


def outside(curve: SeedCurve, level: float) -> str:
    """Why `log_tokens_at` has no answer."""
    if not (math.isfinite(level) and all(math.isfinite(loss) for loss in curve.values())):
        return "a run diverged"
    if min(curve.items())[1] < level:
        return "already its shortest run is better than the baseline's reference; add shorter ones"
    return "even its longest run is worse than the baseline's reference; add longer ones"
