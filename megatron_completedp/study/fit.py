"""Slopes and optima from a few noisy points, with what the seeds say about their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance

import numpy as np
from scipy import stats

#: Resamples of the bootstrap. The quantiles of an interval from few seeds are no finer than this.
RESAMPLES = 1000

#: Quantiles of the 95 % interval.
QUANTILES = (0.025, 0.975)

#: Losses of one seed by log2 of a number's multiple, or of tokens; not finite where a run diverged.
SeedCurve = Mapping[float, float]


def pooled_deviation(groups: Iterable[Sequence[float]]) -> tuple[float, int]:
    """Standard deviation within groups, pooled over them, and its degrees of freedom.

    NaN and 0 where no group has two values.
    """
    repeated = [np.asarray(group, float) for group in groups if len(group) > 1]
    freedom = sum(len(group) - 1 for group in repeated)
    squares = sum(float(((group - group.mean()) ** 2).sum()) for group in repeated)
    return (math.sqrt(squares / freedom), freedom) if freedom else (math.nan, 0)


@dataclass(frozen=True)
class Slope:
    """A straight line's slope with its standard error."""

    value: float
    standard_error: float
    """From the residuals; NaN for two points, which leave none."""


def slope(xs: Sequence[float], ys: Sequence[float]) -> Slope:
    """Least-squares slope of `ys` over `xs`, at least two different `xs`."""
    x, y = np.asarray(xs, float), np.asarray(ys, float)
    assert np.ptp(x) > 0, "a slope needs two different xs"
    centred = x - x.mean()
    spread = float(centred @ centred)
    value = float(centred @ y) / spread
    residuals = y - y.mean() - value * centred
    freedom = len(x) - 2
    variance = float(residuals @ residuals) / freedom if freedom else math.nan
    return Slope(value, math.sqrt(variance / spread))


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """Where a loss curve is lowest, by a parabola through the points near its lowest one."""

    x: float
    """log2 of the multiple; NaN unless bracketed."""
    loss: float
    """Loss of the parabola there; NaN unless bracketed."""
    problem: str = ""
    """Why there is no optimum to read off; empty when it is bracketed."""
    used: tuple[float, ...] = ()
    """The xs the parabola was fitted to, ascending."""
    coefficients: tuple[float, float, float] = (math.nan, math.nan, math.nan)
    """Of x^2, x and 1."""

    @property
    def bracketed(self) -> bool:
        """Whether finite points lie on both sides of the optimum."""
        return not self.problem

    def at(self, x: float) -> float:
        """The parabola's loss at `x`."""
        return float(np.polyval(self.coefficients, x))


def mean_curve(seeds: Sequence[SeedCurve]) -> dict[float, float]:
    """Mean loss over seeds by x, ascending, for the xs that every seed has.

    Infinite where any seed diverged: such a value is no candidate for the optimum, and a diverged
    run has no loss to average.
    """
    means = {}
    for x in sorted(set.intersection(*(set(curve) for curve in seeds))):
        losses = [curve[x] for curve in seeds]
        means[x] = float(np.mean(losses)) if np.isfinite(losses).all() else math.inf
    return means


def optimum(curve: Mapping[float, float], *, window: float) -> Optimum:
    """The minimum of `curve` by a parabola in x.

    It goes through the unbroken run of points around the lowest that lie within `window` nats of
    it, and through the lowest point's two neighbours in any case. A lowest point at the edge of the
    curve or beside a diverged one is not bracketed: the minimum may lie beyond it.
    """
    xs = sorted(curve)
    losses = [curve[x] for x in xs]
    if not np.isfinite(losses).any():
        return Optimum(x=math.nan, loss=math.nan, problem="every point diverged")
    lowest = int(np.argmin(losses))
    finite = [math.isfinite(loss) for loss in losses]
    if not (0 < lowest < len(xs) - 1 and finite[lowest - 1] and finite[lowest + 1]):
        problem = f"the lowest loss is at the edge of the sweep, 2^{xs[lowest]:g}"
        return Optimum(x=math.nan, loss=math.nan, problem=problem)
    near = [loss <= losses[lowest] + window for loss in losses]
    first, last = lowest - 1, lowest + 1
    while first > 0 and near[first] and near[first - 1]:
        first -= 1
    while last < len(xs) - 1 and near[last] and near[last + 1]:
        last += 1
    used = tuple(xs[first : last + 1])
    a, b, c = (float(value) for value in np.polyfit(used, losses[first : last + 1], 2))
    vertex = -b / (2 * a) if a > 0 else math.nan
    if not used[0] <= vertex <= used[-1]:
        problem = f"the parabola through {len(used)} points has no minimum among them"
        return Optimum(x=math.nan, loss=math.nan, problem=problem, used=used)
    return Optimum(
        x=vertex, loss=float(np.polyval((a, b, c), vertex)), used=used, coefficients=(a, b, c)
    )


@dataclass(frozen=True)
class Interval:
    """A 95 % interval; NaN where there is none."""

    low: float
    high: float

    def __format__(self, spec: str) -> str:
        """Both ends in brackets, each as `spec` says; "-" where there is none."""
        return "-" if math.isnan(self.low) else f"[{self.low:{spec}}, {self.high:{spec}}]"


def student(value: float, squared_error: float, freedom: float) -> Interval:
    """The interval of an estimate whose squared standard error has `freedom` degrees of freedom.

    NaN for an error that is not finite, as of units that diverged.
    """
    if not (math.isfinite(squared_error) and freedom > 0):
        return Interval(math.nan, math.nan)
    reach = float(stats.t.ppf(QUANTILES[1], freedom)) * math.sqrt(squared_error)
    return Interval(value - reach, value + reach)


def mean_interval(units: Sequence[float]) -> Interval:
    """Student's interval of the mean of independent `units`; NaN below two, or not finite ones."""
    if len(units) < 2 or not all(map(math.isfinite, units)):
        return Interval(math.nan, math.nan)
    return student(fmean(units), variance(units) / len(units), len(units) - 1)


def bootstrap(seeds: int, statistic: Callable[[Sequence[int]], float]) -> Interval:
    """The percentile interval of `statistic` over resamples of `seeds` seeds.

    `statistic` takes the drawn seed numbers (repeats included), so that several curves can be
    resampled together: seeds share their data order, and a difference between sizes must not be
    charged with the noise that both have. Three seeds are a coarse sample, and the percentile
    interval of three covers less than its 95 %. Undefined (NaN) for one seed, and when more than
    one resample in twenty has no value, since it would then be cut off where it hurts.
    """
    if seeds < 2:
        return Interval(math.nan, math.nan)
    generator = np.random.default_rng(0)
    draws = np.sort(generator.integers(seeds, size=(RESAMPLES, seeds)), axis=1)
    # Few seeds have few different resamples, and each costs a fit per size.
    different, counts = np.unique(draws, axis=0, return_counts=True)
    values = np.repeat([statistic([int(i) for i in draw]) for draw in different], counts)
    values = values[np.isfinite(values)]
    if len(values) < 0.95 * RESAMPLES:
        return Interval(math.nan, math.nan)
    low, high = np.quantile(values, QUANTILES)
    return Interval(float(low), float(high))
