"""Slopes, optima and intervals on data whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_completedp.study.fit import Interval, bootstrap, mean_curve, optimum, slope

GRID = (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)


def parabola(best: float, curvature: float = 0.1, floor: float = 3.0) -> dict[float, float]:
    return {x: floor + curvature * (x - best) ** 2 for x in GRID}


def test_slope_of_a_line_is_exact() -> None:
    found = slope([1, 2, 3, 5], [3, 1, -1, -5])
    assert found.value == pytest.approx(-2)
    # Rounding alone: the residuals are zero.
    assert found.standard_error == pytest.approx(0, abs=1e-12)


def test_standard_error_is_the_scatter_of_slopes() -> None:
    """2,000 noisy lines: the mean of the stated errors is the scatter of the slopes within 5 %."""
    generator = np.random.default_rng(0)
    xs = np.arange(8.0)
    found = [slope(xs, 0.5 * xs + generator.normal(size=8)) for _ in range(2000)]
    scatter = np.std([line.value for line in found])
    # sqrt of the mean square, which unlike the mean is unbiased.
    stated = math.sqrt(np.mean([line.standard_error**2 for line in found]))
    assert stated == pytest.approx(scatter, rel=0.05)


def test_two_points_have_no_standard_error() -> None:
    assert math.isnan(slope([0, 1], [0, 1]).standard_error)


@pytest.mark.parametrize("best", [-1.2, -0.25, 0.0, 0.9])
def test_optimum_of_a_parabola_is_exact(best: float) -> None:
    found = optimum(parabola(best), window=0.1)
    assert found.bracketed
    assert found.x == pytest.approx(best)
    assert found.loss == pytest.approx(3.0)
    assert found.at(best + 1) == pytest.approx(3.1)


def test_points_outside_the_window_have_no_say() -> None:
    """A wall far above the minimum, on one side, would pull a parabola through all points."""
    walled = {**parabola(0.0), 1.5: 9.0, 2.0: 20.0}
    assert optimum(walled, window=0.1).x == pytest.approx(0)
    assert abs(optimum(walled, window=100).x) > 0.3


def test_a_dip_beyond_a_hill_has_no_say() -> None:
    """The window is one unbroken run of points: noise elsewhere is not part of the basin."""
    assert -2.0 not in optimum({**parabola(0.0, 0.2), -2.0: 3.01}, window=0.1).used


@pytest.mark.parametrize("best", [-2.0, 2.0, 5.0])
def test_a_lowest_point_at_the_edge_is_not_bracketed(best: float) -> None:
    found = optimum(parabola(best), window=0.1)
    assert not found.bracketed
    assert math.isnan(found.x)
    assert "edge" in found.problem


def test_a_lowest_point_beside_a_diverged_one_is_not_bracketed() -> None:
    found = optimum({**parabola(0.6), 1.0: math.inf}, window=0.1)
    assert not found.bracketed


def test_a_sweep_that_diverged_everywhere_says_so() -> None:
    assert "diverged" in optimum(dict.fromkeys(GRID, math.inf), window=0.1).problem


def test_a_diverged_seed_is_never_averaged() -> None:
    means = mean_curve([{0.0: 3.0, 1.0: 4.0}, {0.0: 5.0, 1.0: math.inf}])
    assert means == {0.0: 4.0, 1.0: math.inf}


def test_bootstrap_of_a_mean_covers_the_truth() -> None:
    """Eight seeds, 100 studies: 95 % intervals of a mean hold it in 78 to 99 % of them.

    The percentile interval of eight covers about 89 %; three standard deviations of 100 are 10 %.
    """
    generator = np.random.default_rng(1)
    hits = 0
    for _ in range(100):
        sample = generator.normal(size=8)
        interval = bootstrap(8, lambda drawn, sample=sample: float(np.mean(sample[list(drawn)])))
        hits += interval.low <= 0 <= interval.high
    assert 0.78 <= hits / 100 <= 0.99


def test_seeds_are_resampled_together() -> None:
    """What all sizes share cancels in a difference: the interval of the difference is a point."""
    first = [0.3, -0.2, 0.5]
    second = [x + 0.1 for x in first]

    def drift(drawn: list[int]) -> float:
        return float(np.mean([second[i] for i in drawn]) - np.mean([first[i] for i in drawn]))

    found = bootstrap(3, drift)
    # Rounding of a mean.
    assert found.low == pytest.approx(0.1, abs=1e-12)
    assert found.high == pytest.approx(0.1, abs=1e-12)


def test_one_seed_has_no_interval() -> None:
    found = bootstrap(1, lambda drawn: 0.0)
    assert math.isnan(found.low)
    assert f"{found:+.2f}" == "-"


def test_an_interval_is_not_cut_off_where_resamples_have_no_value() -> None:
    def edge(drawn: list[int]) -> float:
        return math.nan if drawn[0] == 0 else 1.0

    assert math.isnan(bootstrap(3, edge).low)
    assert bootstrap(3, lambda drawn: 1.0) == Interval(1.0, 1.0)
