"""Depth profiles: how they move to another depth, and which values they refuse."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from core_cases import quick
from hypothesis import given
from hypothesis import strategies as st

from megatron_completedp.core.multipliers import (
    DepthProfiles,
    LayerProfiles,
    ModuleMultipliers,
    Multipliers,
    interpolate_profile,
)
from megatron_completedp.core.roles import Module
from megatron_completedp.errors import ConfigError

#: One exp of a sum of logs below 5 in size: a few ulp, far below this.
RELATIVE = 1e-12

depths = st.integers(1, 40)
profiles = st.lists(st.floats(0.1, 10), min_size=1, max_size=12).map(tuple)


@quick
@given(profiles)
def test_untouched_at_its_own_depth(profile: tuple[float, ...]) -> None:
    """Bit for bit, also when its geometric mean is not 1: the user's numbers stand."""
    assert interpolate_profile(profile, len(profile)) is profile


@quick
@given(profiles, depths)
def test_geometric_mean_is_one_after_a_move(profile: tuple[float, ...], num_layers: int) -> None:
    if num_layers == len(profile):
        return
    moved = interpolate_profile(profile, num_layers)
    assert len(moved) == num_layers
    # The mean of logs of size <= 5: exact to a few ulp of 5.
    assert math.fsum(map(math.log, moved)) / num_layers == pytest.approx(0, abs=1e-14)


@quick
@given(profiles.map(sorted).map(tuple), depths)
def test_monotone_stays_monotone(profile: tuple[float, ...], num_layers: int) -> None:
    moved = interpolate_profile(profile, num_layers)
    assert all(a <= b * (1 + RELATIVE) for a, b in pairwise(moved))


@quick
@given(profiles, depths)
def test_spread_never_grows(profile: tuple[float, ...], num_layers: int) -> None:
    """Clamping, not extrapolation: no moved value leaves the range of the original."""
    moved = interpolate_profile(profile, num_layers)
    assert max(moved) / min(moved) <= max(profile) / min(profile) * (1 + RELATIVE)


def test_two_layers_to_eight_by_hand() -> None:
    """Layers of 2 sit at 1/4 and 3/4; those of 8 at 1/16, 3/16, ..., 15/16, two clamped a side."""
    log2 = [math.log2(value) for value in interpolate_profile((0.5, 2.0), 8)]
    assert log2 == pytest.approx([-1, -1, -0.75, -0.25, 0.25, 0.75, 1, 1], rel=RELATIVE)


def test_four_layers_to_two_by_hand() -> None:
    """Layers of 2 sit halfway between layers 0, 1 and 2, 3 of 4; the mean log2 2.5 is removed."""
    log2 = [math.log2(value) for value in interpolate_profile((1.0, 2.0, 8.0, 64.0), 2)]
    assert log2 == pytest.approx([0.5 - 2.5, 4.5 - 2.5], rel=RELATIVE)


def test_interpolation_is_in_the_log() -> None:
    """Negative control: linear in the value would give about 4 in the middle, not 1."""
    first, middle, last = interpolate_profile((1 / 16, 16.0), 3)
    assert middle == pytest.approx(1, rel=RELATIVE)
    assert first * last == pytest.approx(1, rel=RELATIVE)


def test_one_layer_has_no_profile_to_move() -> None:
    assert interpolate_profile((3.0,), 4) == (1.0, 1.0, 1.0, 1.0)


def test_to_depth_moves_each_profile_and_leaves_empty_ones_empty() -> None:
    moved = DepthProfiles(lr_mult=(0.5, 2.0), eps_mult=(4.0, 0.25)).to_depth(8)
    assert moved.lr_mult == interpolate_profile((0.5, 2.0), 8)
    assert moved.eps_mult == interpolate_profile((4.0, 0.25), 8)
    assert moved.weight_decay_mult == ()


def test_factor_is_one_outside_the_stack_and_without_a_profile() -> None:
    profiles = DepthProfiles(lr_mult=(0.5, 2.0))
    assert profiles.factor("lr_mult", 1) == 2.0
    assert profiles.factor("lr_mult", None) == 1.0
    assert profiles.factor("eps_mult", 1) == 1.0


def test_a_module_left_out_is_neutral() -> None:
    multipliers = Multipliers(types={Module.Q: ModuleMultipliers(lr_mult=2.0)})
    assert multipliers.of(Module.Q).lr_mult == 2.0
    assert multipliers.of(Module.K) == ModuleMultipliers()


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_factors_must_be_positive_and_finite(value: float) -> None:
    with pytest.raises(ConfigError, match=f"eps_mult is {value}; expected a positive, finite"):
        ModuleMultipliers(eps_mult=value)
    with pytest.raises(ConfigError, match=f"profile lr_mult is {value}; expected a positive, fin"):
        DepthProfiles(lr_mult=(1.0, value))
    with pytest.raises(ConfigError, match=f"mlp_residual_mult is {value}; expected a positive"):
        Multipliers(mlp_residual_mult=value)


def test_a_gain_has_no_init_std_to_multiply() -> None:
    for module in (Module.ATTENTION_NORM, Module.Q_NORM, Module.FINAL_NORM):
        with pytest.raises(ConfigError, match=rf"types\.{module}\.init_std_mult is 2\.0, but"):
            Multipliers(types={module: ModuleMultipliers(init_std_mult=2.0)})
        Multipliers(types={module: ModuleMultipliers(lr_mult=2.0)})
    Multipliers(types={Module.Q: ModuleMultipliers(init_std_mult=2.0)})


def test_a_profile_has_one_factor_for_each_base_layer() -> None:
    profiles = DepthProfiles(lr_mult=(0.5, 2.0))
    Multipliers(depth=profiles).check_depth(2)
    Multipliers().check_depth(7)
    with pytest.raises(ConfigError, match=r"depth\.lr_mult has 2 factors; .* the base's 4 layers"):
        Multipliers(depth=profiles).check_depth(4)
    own = Multipliers(layers={Module.Q: LayerProfiles(eps_mult=(0.5, 2.0))})
    own.check_depth(2)
    with pytest.raises(ConfigError, match=r"layers\.q\.eps_mult has 2 factors; .* base's 4 layers"):
        own.check_depth(4)


def test_a_profile_of_another_mean_is_refused_with_the_remedy() -> None:
    """It would act at the base and be gone at every other depth, where the mean is removed."""
    with pytest.raises(ConfigError) as error:
        DepthProfiles(lr_mult=(1.0, 4.0))
    for part in ("[1.0, 4.0]", "geometric mean of 2; expected 1", "Write [0.5, 2]", "share by 2"):
        assert part in str(error.value)
    with pytest.raises(ConfigError, match="geometric mean of 3"):
        LayerProfiles(eps_mult=(3.0,))
    # Four digits of a third and of 3: what people write down is not refused for its rounding.
    assert DepthProfiles(lr_mult=(0.3333, 3.0)).lr_mult == (0.3333, 3.0)


def test_layers_multiply_the_shared_profile_and_move_like_it() -> None:
    multipliers = Multipliers(
        depth=DepthProfiles(lr_mult=(0.5, 2.0)),
        layers={Module.Q: LayerProfiles(lr_mult=(0.25, 4.0), eps_mult=(2.0, 0.5))},
    )
    assert multipliers.layer_factor(Module.Q, "lr_mult", 0) == 0.125
    assert multipliers.layer_factor(Module.K, "lr_mult", 0) == 0.5
    assert multipliers.layer_factor(Module.Q, "eps_mult", 1) == 0.5
    assert multipliers.layer_factor(Module.EMBEDDING, "lr_mult", None) == 1.0
    moved = multipliers.to_depth(8)
    assert moved.layers[Module.Q].lr_mult == interpolate_profile((0.25, 4.0), 8)
    assert moved.depth == multipliers.depth.to_depth(8)


def test_layers_are_refused_where_there_are_none() -> None:
    with pytest.raises(
        ConfigError, match=r"layers names embedding, .* under multipliers\.types\.em"
    ):
        Multipliers(layers={Module.EMBEDDING: LayerProfiles()})
    with pytest.raises(ConfigError, match=r"layers\.q_norm\.init_std_mult is \(0\.5, 2\.0\), but"):
        Multipliers(layers={Module.Q_NORM: LayerProfiles(init_std_mult=(0.5, 2.0))})


@pytest.mark.parametrize(
    ("multipliers", "level"),
    [
        (Multipliers(attention_residual_mult=0.5), "global"),
        (Multipliers(types={Module.Q: ModuleMultipliers(lr_mult=2.0)}), "types"),
        (Multipliers(depth=DepthProfiles(mlp_residual_mult=(0.5, 2.0))), "types_x_depth"),
        (Multipliers(layers={Module.Q: LayerProfiles(lr_mult=(0.5, 2.0))}), "full"),
    ],
)
def test_the_level_is_that_of_the_finest_factor(multipliers: Multipliers, level: str) -> None:
    assert multipliers.level == level
