"""Float parameters of any Optuna study, as a trust region moves them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from optuna.distributions import BaseDistribution, FloatDistribution

from megatron_completedp.errors import ConfigError
from megatron_completedp.search.linear_model import Floats


@dataclass(frozen=True)
class Axis:
    """One float parameter as the search moves it: its logarithm under `log=True`, else itself."""

    distribution: FloatDistribution
    start: float
    radius: float
    """Start radius of the region."""
    least: float
    """The region's radius is not narrowed below it."""
    kind: str = ""
    """Axes of one kind matter about as much as each other."""

    @property
    def low(self) -> float:
        """Lower bound on the axis."""
        return self.coordinate(self.distribution.low)

    @property
    def high(self) -> float:
        """Upper bound on the axis."""
        return self.coordinate(self.distribution.high)

    def coordinate(self, value: float) -> float:
        """Where `value` is on the axis."""
        return math.log(value) if self.distribution.log else value

    def value(self, coordinate: float) -> float:
        """The parameter's value at `coordinate`, within the bounds and on the step, if any."""
        of = self.distribution
        value = math.exp(coordinate) if of.log else coordinate
        if of.step is not None:
            value = of.low + round((value - of.low) / of.step) * of.step
        # exp(log(x)) is not always x.
        return min(max(value, of.low), of.high)

    def reach(self, scale: float) -> float:
        """The region's radius at `scale`."""
        return max(scale * self.radius, self.least)


def axes_of(
    space: Mapping[str, BaseDistribution],
    *,
    start: Mapping[str, float],
    radius: float | Mapping[str, float],
    kinds: Mapping[str, str],
    floor: float,
) -> dict[str, Axis]:
    """The float parameters of `space` that can vary; the arguments are `TrustRegionSampler`'s.

    Raises ConfigError for a radius that is missing or not above 0, and a start out of bounds.
    """
    return {
        name: _axis(name, of, start.get(name), radius, kinds.get(name, ""), floor)
        for name, of in space.items()
        if isinstance(of, FloatDistribution) and not of.single()
    }


def vector(axes: Mapping[str, Axis], params: Mapping[str, float]) -> Floats:
    """Coordinates of `params`."""
    return np.array([axis.coordinate(params[name]) for name, axis in axes.items()])


def _axis(
    name: str,
    of: FloatDistribution,
    start: float | None,
    radius: float | Mapping[str, float],
    kind: str,
    floor: float,
) -> Axis:
    reach = radius.get(name) if isinstance(radius, Mapping) else radius
    if reach is None or not 0 < reach < math.inf:
        raise ConfigError(f"trust region: radius of {name} is {reach!r}, must be above 0")
    if start is None:
        middle = math.sqrt(of.low * of.high) if of.log else (of.low + of.high) / 2
        start = 0.0 if not of.log and of.low <= 0 <= of.high else middle
    if not of.low <= start <= of.high:
        bounds = f"[{of.low:g}, {of.high:g}]"
        raise ConfigError(f"trust region: start of {name} is {start!r}, outside {bounds}")
    # A coordinate with a small start radius is not widened to the floor.
    return Axis(of, math.log(start) if of.log else start, reach, min(floor, reach), kind)
