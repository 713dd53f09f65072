"""A cheap stand-in for training runs: what samplers are compared on at equal budget, in seconds.

loss(x) = level + sum_i (slope_i x_i + curvature_i x_i^2) + seed + noise, x in natural logs of
multipliers with 0 = the base run, until a coordinate passes its cliff: there the run diverges and
its loss is the ceiling, that of knowing nothing. Runs of one seed share its effect, as in training.
`fit` reads the numbers off real trials; `synthetic` states some for when there are none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from optuna.distributions import FloatDistribution
from scipy.optimize import lsq_linear

from megatron_completedp.errors import ConfigError
from megatron_completedp.search.seed_noise import SeedNoise

#: Pull of the fit towards a flat landscape, in rows' worth of evidence for each coordinate: trials
#: are fewer than coefficients, and what they do not show should not be in the surrogate.
RIDGE = 1.0


@dataclass(frozen=True)
class Row:
    """One real trial."""

    point: Mapping[str, float]
    """Natural logs of the multipliers."""
    loss: float
    diverged: bool = False
    chosen: bool = False
    """Its point was kept for this run, whose loss is biased low: it is no sample of the noise."""
    replicate: int = 0
    """Which run of its point it is: equal ones have equal seeds."""


@dataclass(frozen=True)
class Valley:
    """One coordinate of a surrogate."""

    low: float
    high: float
    slope: float
    """Nats of loss per nat of the multiplier, at the base."""
    curvature: float
    """Nats of loss per squared nat, not below 0."""
    cliff_low: float = -math.inf
    """Below it, a run diverges."""
    cliff_high: float = math.inf
    """Above it, a run diverges."""

    @property
    def best(self) -> float:
        """Where the loss is lowest, within the bounds and the cliffs."""
        low, high = max(self.low, self.cliff_low), min(self.high, self.cliff_high)
        if self.curvature == 0:
            return low if self.slope > 0 else high if self.slope < 0 else min(max(0, low), high)
        return min(max(-self.slope / (2 * self.curvature), low), high)


@dataclass(frozen=True)
class Surrogate:
    """A separable quadratic with cliffs and seed noise."""

    level: float
    """Loss of the base, without noise."""
    noise: float
    """Standard deviation of a run once the effect of its seed is taken out."""
    ceiling: float
    """Loss of a diverged run."""
    valleys: Mapping[str, Valley]
    """By name of the multiplier."""
    seed_noise: float = 0.0
    """Standard deviation of what a seed does to all points alike."""

    @property
    def space(self) -> dict[str, FloatDistribution]:
        """The parameters, for Optuna."""
        return {name: FloatDistribution(of.low, of.high) for name, of in self.valleys.items()}

    @property
    def best(self) -> float:
        """The lowest loss there is, without noise."""
        return self.loss({name: valley.best for name, valley in self.valleys.items()})

    def diverges(self, point: Mapping[str, float]) -> bool:
        """Whether a run at `point` falls off a cliff, or comes to no better than the ceiling."""
        return self.loss(point) >= self.ceiling

    def loss(self, point: Mapping[str, float]) -> float:
        """Loss at `point` without noise; the ceiling where it diverges."""
        if any(
            not valley.cliff_low <= point[name] <= valley.cliff_high
            for name, valley in self.valleys.items()
        ):
            return self.ceiling
        slopes = (
            (valley.slope + valley.curvature * point[name]) * point[name]
            for name, valley in self.valleys.items()
        )
        return min(self.ceiling, self.level + sum(slopes))

    def observe(
        self, point: Mapping[str, float], generator: np.random.Generator, *, seed: float = 0.0
    ) -> float:
        """Loss of one run at `point`; diverged runs have no noise.

        `seed` is its seed's effect in units of `seed_noise`, the same for all runs of that seed.
        """
        loss = self.loss(point)
        if loss >= self.ceiling:
            return loss
        return loss + self.seed_noise * seed + self.noise * float(generator.normal())


def synthetic(dimensions: int = 79, *, seed: int = 0, noise: float = 0.005) -> Surrogate:
    """An instance without real trials behind it; every number of it is an assumption stated here.

    Bounds +-ln 10. The best values lie N(0, 0.5) nats from the base; curvatures are log-normal with
    a spread of one nat, so that a few coordinates matter most, scaled so that all of them
    together win 0.1 nats. Two coordinates in three have a cliff, 0.5 to 2.5 nats from the base (and
    0.2 beyond the best value at least) on the side of the best value: what is worth changing is
    what can break. Noise 0.005 nats; level 3.5; ceiling 10, about the log of 22 thousand tokens.
    """
    generator = np.random.default_rng(seed)
    bound = math.log(10)
    best = np.clip(generator.normal(0, 0.5, dimensions), -0.9 * bound, 0.9 * bound)
    curvature = np.exp(generator.normal(0, 1, dimensions))
    curvature *= 0.1 / (curvature @ best**2)
    distance = np.maximum(generator.uniform(0.5, 2.5, dimensions), abs(best) + 0.2)
    has_cliff = generator.uniform(size=dimensions) < 2 / 3
    valleys = {}
    for i in range(dimensions):
        cliff = distance[i] if has_cliff[i] else math.inf
        valleys[f"x{i:02d}"] = Valley(
            low=-bound,
            high=bound,
            slope=float(-2 * curvature[i] * best[i]),
            curvature=float(curvature[i]),
            cliff_low=-math.inf if best[i] > 0 else -cliff,
            cliff_high=cliff if best[i] > 0 else math.inf,
        )
    return Surrogate(level=3.5, noise=noise, ceiling=10.0, valleys=valleys)


def fit(
    rows: Sequence[Row], space: Mapping[str, FloatDistribution], *, ceiling: float
) -> Surrogate:
    """The surrogate that real trials suggest.

    Slopes and curvatures (not below 0) by least squares with a ridge, from the runs that did not
    diverge. Noise, and the part that seeds have in it, from points that were run more than once;
    without any, from what the fit leaves over, which is an upper bound. Cliffs: see `_cliffs`.
    Raises ConfigError without two good rows.
    """
    good = [row for row in rows if not row.diverged and math.isfinite(row.loss)]
    if len(good) < 2:
        raise ConfigError(f"surrogate: {len(good)} of {len(rows)} trials ended well, 2 are needed")
    names = list(space)
    x = np.array([[row.point[name] for name in names] for row in good])
    y = np.array([row.loss for row in good])
    columns = np.concatenate([x, x**2], axis=1)
    # In units of each coordinate's own spread, so that the ridge is the same evidence for all.
    spread = np.sqrt((columns**2).mean(axis=0))
    spread[spread == 0] = 1
    ridge = math.sqrt(RIDGE) * np.eye(columns.shape[1])
    # The level is free: its column is 1 in the rows and 0 in the ridge.
    left = np.block([[np.ones((len(y), 1)), columns / spread], [np.zeros((len(ridge), 1)), ridge]])
    right = np.concatenate([y, np.zeros(len(ridge))])
    least = np.full(left.shape[1], -np.inf)
    least[1 + len(names) :] = 0
    solution = lsq_linear(left, right, bounds=(least, np.inf)).x
    coefficients = solution[1:] / spread
    left_over = y - solution[0] - columns @ coefficients
    low, high = _cliffs(rows, names)
    valleys = {
        name: Valley(
            low=of.low,
            high=of.high,
            slope=float(coefficients[i]),
            curvature=float(coefficients[len(names) + i]),
            cliff_low=low.get(name, -math.inf),
            cliff_high=high.get(name, math.inf),
        )
        for i, (name, of) in enumerate(space.items())
    }
    run, noise = _repeat_noise(good)
    if math.isinf(run):
        run = noise = float(np.sqrt((left_over**2).mean()))
    return Surrogate(
        level=float(solution[0]),
        noise=noise,
        seed_noise=math.sqrt(max(run**2 - noise**2, 0.0)),
        ceiling=ceiling,
        valleys=valleys,
    )


def _repeat_noise(rows: Sequence[Row]) -> tuple[float, float]:
    """Standard deviations of a run within its point, with and without its seed's effect.

    inf without a point that was repeated.
    """
    losses: dict[tuple[float, ...], dict[int, float]] = {}
    for row in rows:
        if not row.chosen:
            losses.setdefault(tuple(row.point.values()), {})[row.replicate] = row.loss
    seeds = SeedNoise()
    for point, by_seed in losses.items():
        seeds.replace(point, by_seed)
    return seeds.run().deviation, seeds.paired().deviation


def _cliffs(rows: Sequence[Row], names: Sequence[str]) -> tuple[dict[str, float], dict[str, float]]:
    """Lower and upper cliffs by name.

    A coordinate's side can explain a diverged run that went further there than every run that ended
    well. The side that explains most gets a cliff, half way between the two, until none is left to
    explain: few cliffs rather than many.
    """
    good = np.array([[row.point[name] for name in names] for row in rows if not row.diverged])
    bad = np.array([[row.point[name] for name in names] for row in rows if row.diverged])
    low: dict[str, float] = {}
    high: dict[str, float] = {}
    while len(bad):
        beyond = {1: bad > good.max(axis=0), -1: bad < good.min(axis=0)}
        side = max(beyond, key=lambda sign: int(beyond[sign].sum(axis=0).max()))
        column = int(beyond[side].sum(axis=0).argmax())
        explained = beyond[side][:, column]
        if not explained.any():
            break
        nearest = side * float((side * bad[explained, column]).min())
        safe = side * float((side * good[:, column]).max())
        (high if side == 1 else low)[names[column]] = (nearest + safe) / 2
        bad = bad[~explained]
    return low, high
