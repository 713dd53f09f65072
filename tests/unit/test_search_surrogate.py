"""The surrogate: what a fit recovers, and that samplers can be compared on it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("optuna")

from optuna.distributions import FloatDistribution

from megatron_completedp.errors import ConfigError
from megatron_completedp.search.simulate import simulate
from megatron_completedp.search.surrogate import (
    Row,
    Surrogate,
    Valley,
    fit,
    synthetic,
)

TRUE = Surrogate(
    level=3.0,
    noise=0.01,
    ceiling=10.0,
    valleys={
        "a": Valley(-2, 2, slope=-0.4, curvature=0.2, cliff_high=1.5),
        "b": Valley(-2, 2, slope=0.1, curvature=0.3, cliff_low=-1.2),
        "c": Valley(-2, 2, slope=0.0, curvature=0.0),
    },
)


#: Effects of the seeds of first runs, second runs and so on, in units of `seed_noise`.
SEEDS = (0.0, 1.5, -1.5)


def rows(count: int, repeats: int = 1) -> list[Row]:
    generator = np.random.default_rng(0)
    found = []
    for _ in range(count):
        point = {name: float(generator.uniform(-2, 2)) for name in TRUE.valleys}
        diverged = TRUE.diverges(point)
        found += [
            Row(
                point,
                TRUE.observe(point, generator, seed=SEEDS[replicate]),
                diverged,
                replicate=replicate,
            )
            for replicate in range(repeats)
        ]
    return found


def test_a_fit_finds_the_valleys_and_the_cliffs_it_was_shown() -> None:
    """200 runs with a noise of 0.01: slopes to 0.01 / sqrt(200 * 4/3) = 6e-4, and ridge's bias."""
    fitted = fit(rows(200), TRUE.space, ceiling=10.0)
    assert fitted.level == pytest.approx(3.0, abs=0.01)
    for name, valley in TRUE.valleys.items():
        assert fitted.valleys[name].slope == pytest.approx(valley.slope, abs=0.01)
        assert fitted.valleys[name].curvature == pytest.approx(valley.curvature, abs=0.01)
        # Between neighbouring draws, which are 4 / 200 apart on average.
        assert fitted.valleys[name].cliff_low == pytest.approx(valley.cliff_low, abs=0.1)
        assert fitted.valleys[name].cliff_high == pytest.approx(valley.cliff_high, abs=0.1)
    # Residuals still hold the ridge's bias: an upper bound, as stated.
    assert 0.008 < fitted.noise < 0.02


def test_repeated_points_give_the_noise_by_themselves() -> None:
    # 100 degrees of freedom or so: a relative error of 1 / sqrt(200) = 7 %, taken three times.
    assert fit(rows(150, 2), TRUE.space, ceiling=10.0).noise == pytest.approx(0.01, rel=0.21)


def test_what_a_seed_does_to_all_points_is_told_from_the_rest() -> None:
    """Effects of 0, 0.03 and -0.03: a standard deviation of 0.03 beside the noise's 0.01."""
    true = replace(TRUE, seed_noise=0.02)
    generator = np.random.default_rng(0)
    seen = [
        Row(
            point := {name: float(x) for name, x in zip(TRUE.valleys, draw, strict=True)},
            true.observe(point, generator, seed=effect),
            replicate=replicate,
        )
        for draw in generator.uniform(-1, 1, size=(60, 3))
        for replicate, effect in enumerate(SEEDS)
    ]
    fitted = fit(seen, TRUE.space, ceiling=10.0)
    assert fitted.noise == pytest.approx(0.01, rel=0.2)
    assert fitted.seed_noise == pytest.approx(0.03, rel=0.1)


def test_a_point_at_the_ceiling_has_diverged() -> None:
    """Without a cliff too: training ends such a run as diverged."""
    steep = Surrogate(
        level=3.0, noise=0.0, ceiling=4.0, valleys={"a": Valley(-2, 2, slope=0.0, curvature=1.0)}
    )
    assert steep.diverges({"a": 1.0})
    assert not steep.diverges({"a": 0.9})


def test_a_run_that_a_point_was_kept_for_is_no_sample_of_the_noise() -> None:
    fresh = rows(20, 3)
    low = [Row(row.point, row.loss - 0.1, row.diverged, chosen=True) for row in fresh[::3]]
    before, after = (fit(seen, TRUE.space, ceiling=10.0) for seen in (fresh, [*fresh, *low]))
    assert after.noise == pytest.approx(before.noise)
    assert after.seed_noise == pytest.approx(before.seed_noise)
    # Negative control: as any other run of its seed, it would count.
    plain = [replace(row, chosen=False) for row in low]
    wrong = fit([*fresh, *plain], TRUE.space, ceiling=10.0)
    assert wrong.seed_noise > 2 * max(before.seed_noise, before.noise)


def test_a_divergence_among_good_runs_makes_no_cliff() -> None:
    inside = [Row({"a": a}, 3.0) for a in (-1.0, 1.0)]
    fitted = fit([*inside, Row({"a": 0.0}, 10.0, True)], {"a": FloatDistribution(-2, 2)}, ceiling=9)
    assert fitted.valleys["a"].cliff_high == math.inf


def test_a_fit_needs_runs_that_ended_well() -> None:
    with pytest.raises(ConfigError, match="1 of 2 trials ended well"):
        fit([Row({"a": 0.0}, 3.0), Row({"a": 1.0}, math.nan)], TRUE.space, ceiling=9)


def test_the_best_point_is_within_bounds_and_cliffs() -> None:
    assert Valley(-2, 2, slope=-0.4, curvature=0.2).best == pytest.approx(1.0)
    assert Valley(-2, 2, slope=-0.4, curvature=0.2, cliff_high=0.5).best == 0.5
    assert Valley(-2, 2, slope=-4.0, curvature=0.2).best == 2
    assert Valley(-2, 2, slope=1.0, curvature=0.0).best == -2
    assert Valley(1, 2, slope=0.0, curvature=0.0).best == 1


@pytest.mark.parametrize("dimensions", [1, 23, 79])
def test_the_synthetic_instance_is_what_it_says(dimensions: int) -> None:
    surrogate = synthetic(dimensions, seed=2)
    base = dict.fromkeys(surrogate.space, 0.0)
    assert surrogate.loss(base) == surrogate.level == 3.5
    assert surrogate.best == pytest.approx(3.4)
    best = {name: valley.best for name, valley in surrogate.valleys.items()}
    assert not surrogate.diverges(best)
    over = {name: math.log(10) for name in surrogate.space}
    assert dimensions == 1 or surrogate.loss(over) == surrogate.ceiling


def test_on_the_synthetic_instance_the_trust_region_beats_random_draws() -> None:
    """At 23 coordinates random draws fall off a cliff nine times in ten; the base stays their best.

    Measured gains of 0.071, 0.083 and 0.065 nats of the 0.1 there are, for the first three seeds.
    """
    for repeat in range(2):
        ours, theirs = (
            simulate(synthetic(23), name, repeat=repeat, runs=150)[-1]
            for name in ("trust_region", "random")
        )
        assert ours.loss < 3.5 - 0.05
        assert theirs.loss == 3.5
        assert ours.diverged < theirs.diverged
