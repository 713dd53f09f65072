"""What is left of a run's scatter when points are compared seed by seed.

Runs of one seed share its batches and its initial draws, so that most of what a seed does to the
loss it does to every point alike: `loss = point + seed + noise`. Differences between points on
equal seeds are free of the second term, and their error is made of the third alone.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import NamedTuple

#: Below these degrees of freedom an estimate is too often too small by luck (at 4 it is half of the
#: true deviation or less in 1 of 11 cases, at 1 in 4 of 11).
_LEAST_FREEDOM = 4


class Spread(NamedTuple):
    """An estimated standard deviation."""

    deviation: float
    """inf where it is not known."""
    freedom: int
    """Degrees of freedom."""


class Gain(NamedTuple):
    """By how much a point is better than another."""

    nats: float
    standard_error: float
    freedom: int
    """Degrees of freedom of the error."""


def near_lowest(losses: Mapping[int, float], cliff: float) -> dict[int, float]:
    """The runs of one point without those more than `cliff` nats above its lowest.

    A run off the cliff is no sample of the noise: its value says that something broke.
    """
    edge = min(losses.values(), default=math.inf) + cliff
    return {key: loss for key, loss in losses.items() if loss <= edge}


class SeedNoise:
    """Deviations of a run within its point, with and without the effects of seeds.

    Least squares of the additive model over points with several runs, in sums that a changed point
    leaves and enters again: A x = b are its normal equations for the seeds' effects once the
    points' are eliminated, c is the sum of squares within points.
    """

    def __init__(self) -> None:
        self._a: dict[tuple[int, int], float] = {}
        self._b: dict[int, float] = {}
        self._c = 0.0
        self._freedom = 0
        self._points: dict[Hashable, dict[int, float]] = {}
        self._paired: Spread | None = None

    def replace(self, point: Hashable, losses: Mapping[int, float]) -> None:
        """Takes the finite `losses` by seed for all that is known of `point`."""
        self._add(self._points.get(point, {}), -1)
        self._points[point] = dict(losses)
        self._add(losses, 1)
        self._paired = None

    def _add(self, losses: Mapping[int, float], sign: int) -> None:
        if len(losses) < 2:
            return
        mean = sum(losses.values()) / len(losses)
        for seed, loss in losses.items():
            self._b[seed] = self._b.get(seed, 0.0) + sign * (loss - mean)
            for other in losses:
                cell = (seed == other) - 1 / len(losses)
                self._a[seed, other] = self._a.get((seed, other), 0.0) + sign * cell
        self._c += sign * sum((loss - mean) ** 2 for loss in losses.values())
        self._freedom += sign * (len(losses) - 1)

    def run(self) -> Spread:
        """Of a run within its point, seeds included."""
        known = math.sqrt(max(self._c, 0.0) / self._freedom) if self._freedom else math.inf
        return Spread(known, self._freedom)

    def paired(self) -> Spread:
        """Of a run once its seed's effect is taken out.

        `run()`, which is larger or equal on average, until enough points were run on equal seeds.
        """
        if self._paired is None:
            self._paired = self._fit()
        return self._paired

    @property
    def knows_seeds(self) -> bool:
        """Whether enough points were run on equal seeds to tell what seeds do to all of them."""
        return self._freedom - self._eliminate()[1] >= _LEAST_FREEDOM

    def _fit(self) -> Spread:
        explained, rank = self._eliminate()
        freedom = self._freedom - rank
        if freedom < _LEAST_FREEDOM:
            return self.run()
        return Spread(math.sqrt(max(self._c - explained, 0.0) / freedom), freedom)

    def _eliminate(self) -> tuple[float, int]:
        """The sum of squares that the seeds' effects explain, and how many of them there are."""
        seeds = sorted(self._b)
        a = [[self._a.get((row, column), 0.0) for column in seeds] for row in seeds]
        b = [self._b[seed] for seed in seeds]
        explained, rank = 0.0, 0
        for pivot in range(len(seeds)):
            if a[pivot][pivot] < 1e-9:  # the constant of a connected set of seeds is free
                continue
            explained += b[pivot] ** 2 / a[pivot][pivot]
            rank += 1
            for row in range(pivot + 1, len(seeds)):
                factor = a[row][pivot] / a[pivot][pivot]
                b[row] -= factor * b[pivot]
                for column in range(pivot, len(seeds)):
                    a[row][column] -= factor * a[pivot][column]
        return explained, rank

    def seeds_help(self, runs: int, others: int) -> bool:
        """Whether `runs` on equal seeds tell more than as many against the mean of `others`."""
        paired = self.paired().deviation * math.sqrt(2 / runs)
        return paired < self.run().deviation * math.sqrt(1 / runs + 1 / others)

    def gain(self, point: Hashable, over: Hashable) -> Gain:
        """How far `point` is below `over`; both have runs.

        Over equal seeds, or between the means where that is sharper: seeds may not be shared.
        """
        new, old = self._points[point], self._points[over]
        gains = [old[seed] - new[seed] for seed in new if seed in old]
        if gains and self.seeds_help(len(gains), len(old)):
            noise, error = self.paired(), math.sqrt(2 / len(gains))
            return Gain(sum(gains) / len(gains), noise.deviation * error, noise.freedom)
        noise, error = self.run(), math.sqrt(1 / len(new) + 1 / len(old))
        difference = sum(old.values()) / len(old) - sum(new.values()) / len(new)
        return Gain(difference, noise.deviation * error, noise.freedom)
