"""The space of a search: what it holds, what a point does to a run, and bounds."""

from __future__ import annotations

import json
import math
import random
from dataclasses import fields
from typing import Any

import pytest
from config_samples import small_tree

from megatron_completedp.config.load import build
from megatron_completedp.config.run import RunConfig
from megatron_completedp.core.hyperparams import Resolved
from megatron_completedp.core.multipliers import LEVELS, DepthProfiles, Level
from megatron_completedp.core.roles import Module
from megatron_completedp.errors import ConfigError, HyperparamError
from megatron_completedp.plan.run_plan import Plan
from megatron_completedp.search.dimensions import KINDS, RESIDUALS
from megatron_completedp.search.space import Space


def proxy(**changes: Any) -> RunConfig:
    """A run of 4 layers that is its own base."""
    return build(RunConfig, small_tree(**{"base": None, **changes}))


def resolved(config: RunConfig) -> Resolved:
    return Plan.of(config).resolved


@pytest.mark.parametrize(
    ("level", "count"),
    [
        ("global", 8 + 2),  # lr, decay, eps, two betas, three stds; two branches
        # 9 weights x 6; 5 gains x 4, which have neither decay nor std; two branches
        ("types", 9 * 6 + 5 * 4 + 2),
        ("types_x_depth", 9 * 6 + 5 * 4 + 2 + (6 + 2) * 4),  # 8 profiles of 4 layers
        # 7 weights x 6 and 4 gains x 4 inside the stack, and two branches, by layer
        ("full", 9 * 6 + 5 * 4 + 2 + (7 * 6 + 4 * 4 + 2) * 4),
    ],
)
def test_dimensions_of_each_level(level: Level, count: int) -> None:
    names = Space.of(proxy(), level).names
    assert len(names) == len(set(names)) == count


def test_names_are_paths() -> None:
    assert "hyperparams.one_minus_beta2" in Space.of(proxy(), "global").names
    assert "types.q.lr_mult" in Space.of(proxy(), "types").names
    assert "depth.lr_mult.3" in Space.of(proxy(), "types_x_depth").names
    assert "layers.q.lr_mult.3" in Space.of(proxy(), "full").names
    for level in LEVELS:
        assert "attention_residual_mult" in Space.of(proxy(), level).names


@pytest.mark.parametrize(
    ("changes", "absent", "present"),
    [
        ({"model.activation": "gelu"}, "types.gate.lr_mult", "types.up.lr_mult"),
        (
            {"model.tied_embeddings": True, "parametrization": "sp"},
            "types.unembedding.lr_mult",
            "types.embedding.lr_mult",
        ),
        ({}, "types.q_norm.init_std_mult", "types.q.init_std_mult"),
        ({}, "types.q_norm.weight_decay_mult", "types.q.weight_decay_mult"),
        (
            {"hyperparams.weight_decay": 0, "hyperparams.gain_weight_decay": 0.1},
            "types.q.weight_decay_mult",
            "types.q_norm.weight_decay_mult",
        ),
    ],
)
def test_only_what_acts_on_the_model(changes: dict[str, Any], absent: str, present: str) -> None:
    names = Space.of(proxy(**changes), "types").names
    assert absent not in names
    assert present in names


def test_one_layer_has_no_profile() -> None:
    assert Space.of(proxy(**{"model.num_layers": 1}), "full").names == (
        *Space.of(proxy(**{"model.num_layers": 1}), "types").names,
    )


def test_profiles_have_the_layers_of_the_base() -> None:
    """The sample has 4 layers and a base of 2, at which multipliers are given."""
    config = build(RunConfig, small_tree())
    space = Space.of(config, "types_x_depth")
    assert "depth.lr_mult.1" in space.names
    assert "depth.lr_mult.2" not in space.names
    assert space.apply(config, {"depth.lr_mult.1": 0.2}).multipliers.depth.lr_mult == (
        pytest.approx((math.exp(-0.1), math.exp(0.1)))
    )


BASES: list[dict[str, Any]] = [
    {},
    {"hyperparams.beta1": 0.3, "hyperparams.gain_weight_decay": 0.1},
    {"multipliers.types": {"q": {"one_minus_beta1_mult": 5}}, "multipliers.mlp_residual_mult": 3},
    {"multipliers.depth.one_minus_beta1_mult": [3, 1, 1, 0.3333333333333333]},
    {"multipliers.layers": {"v": {"one_minus_beta1_mult": [0.25, 1, 1, 4]}}},
]


@pytest.mark.parametrize("changes", BASES)
@pytest.mark.parametrize("level", LEVELS)
def test_zero_is_the_base_run_bit_for_bit(level: Level, changes: dict[str, Any]) -> None:
    config = proxy(**changes)
    space = Space.of(config, level)
    same = resolved(config).sha256
    assert resolved(space.apply(config, dict.fromkeys(space.names, 0.0))).sha256 == same
    assert space.apply(config, {}) == config
    # Negative control: the hash sees a move in the last digits.
    assert resolved(space.apply(config, {"mlp_residual_mult": 1e-15})).sha256 != same


@pytest.mark.parametrize("changes", BASES)
@pytest.mark.parametrize("level", LEVELS)
def test_no_corner_of_the_bounds_brings_a_beta_out_of_its_range(
    level: Level, changes: dict[str, Any]
) -> None:
    """`resolve` raises for a beta outside (0, 1).

    All ends, and one layer up with the others down: removing the mean makes that the worst case.
    """
    config = proxy(**changes)
    space = Space.of(config, level)
    draw = random.Random(1)
    ends: list[dict[str, float]] = [
        {item.name: item.low for item in space.dimensions},
        {item.name: item.high for item in space.dimensions},
        {item.name: item.low if item.name[-2:] in (".1", ".2", ".3") else item.high
         for item in space.dimensions},
    ]  # fmt: skip
    ends += [
        {item.name: draw.choice((item.low, item.high)) for item in space.dimensions}
        for _ in range(5)
    ]
    for point in ends:
        resolved(space.apply(config, point))


def test_each_level_has_every_point_of_the_one_before() -> None:
    """At the ends of the bounds too, where type and layers together have no room for both."""
    config, draw = proxy(), random.Random(2)
    types, grid, full = (Space.of(config, level) for level in ("types", "types_x_depth", "full"))

    def corner(space: Space) -> dict[str, float]:
        return {item.name: draw.choice((item.low, item.high)) for item in space.dimensions}

    for _ in range(5):
        point = corner(types)
        for finer in (grid, full):
            assert finer.apply(config, point) == types.apply(config, point)
        point = corner(grid)
        alike = {}
        for name, value in point.items():
            _, leaf, layer = name.split(".") if name.startswith("depth.") else ("", "", "")
            if leaf.endswith("_mult") and leaf not in RESIDUALS:
                inside = (each for each in full.names if each.startswith("layers."))
                same = [each for each in inside if each.endswith(f".{leaf}.{layer}")]
                alike |= dict.fromkeys(same, value)
            else:
                alike[name] = value
        ours, theirs = (resolved(s.apply(config, p)) for s, p in ((full, alike), (grid, point)))
        for one, other in zip(ours.modules, theirs.modules, strict=True):
            assert one.optimizer_values == pytest.approx(other.optimizer_values)
            assert one.init_std == pytest.approx(other.init_std)
        assert ours.residual == theirs.residual


def test_the_type_yields_where_it_and_its_layers_exceed_what_a_beta_may_be() -> None:
    config = proxy()
    space = Space.of(config, "full")
    point = {"types.q.one_minus_beta1_mult": 2.2, "layers.q.one_minus_beta1_mult.0": 1.0}
    moved = space.apply(config, point).multipliers
    profile = moved.layers[Module.Q].one_minus_beta1_mult
    assert profile == pytest.approx([math.exp(0.75), *[math.exp(-0.25)] * 3])
    # 1 - beta1 of the largest layer is where a tenth of the base's beta1 is left.
    assert 0.1 * moved.of(Module.Q).one_minus_beta1_mult * profile[0] == pytest.approx(1 - 0.09)
    assert moved.of(Module.K) == config.multipliers.of(Module.K)


def test_a_wider_bound_would_bring_a_beta_out() -> None:
    """Negative control of the test above: 1 - beta1 = 0.1 times e^2.4 is more than 1."""
    config = proxy()
    name = "types.q.one_minus_beta1_mult"
    with pytest.raises(
        ConfigError, match=r"bounds\.types\.q\.one_minus_beta1_mult is \[-1, 2\.4\]"
    ):
        Space.of(config, "types", {name: (-1, 2.4)})
    forced = Space.of(config, "types").apply(config, {name: 2.2})
    q = forced.multipliers.of(Module.Q)
    assert q.one_minus_beta1_mult == pytest.approx(math.exp(2.2))
    changes = {"multipliers.types": {"q": {"one_minus_beta1_mult": math.exp(2.4)}}}
    with pytest.raises(HyperparamError, match="beta1 of q"):
        resolved(proxy(**changes))
    with pytest.raises(ConfigError, match=r"bring beta1 to -0\.1"):
        Space.of(proxy(**changes), "types")


def test_global_moves_the_base() -> None:
    config = proxy()
    space = Space.of(config, "global")
    logs = {"hyperparams.lr": 0.5, "hyperparams.one_minus_beta1": 0.7, "mlp_residual_mult": -0.2}
    moved = space.apply(config, logs)
    # 1e-12 relative: one exp and one product each, and 1 - beta cancels a digit.
    assert moved.hyperparams.lr == pytest.approx(0.01 * math.exp(0.5), rel=1e-12)
    assert 1 - moved.hyperparams.beta1 == pytest.approx(0.1 * math.exp(0.7), rel=1e-12)
    assert moved.multipliers.mlp_residual_mult == pytest.approx(math.exp(-0.2), rel=1e-12)
    assert moved.hyperparams.beta2 == config.hyperparams.beta2
    assert moved.multipliers.types == {}


def test_a_tied_weight_keeps_one_std() -> None:
    config = proxy(**{"model.tied_embeddings": True, "parametrization": "sp"})
    space = Space.of(config, "global")
    assert "hyperparams.unembedding_init_std" not in space.names
    moved = space.apply(config, {"hyperparams.embedding_init_std": 0.5}).hyperparams
    assert moved.unembedding_init_std == moved.embedding_init_std != 0.02


def test_types_and_layers_multiply_what_the_base_run_has() -> None:
    config = proxy(**{"multipliers.types": {"q": {"lr_mult": 3.0}}})
    space = Space.of(config, "full")
    moved = space.apply(config, {"types.q.lr_mult": math.log(2), "layers.q.lr_mult.0": 0.4})
    assert moved.multipliers.of(Module.Q).lr_mult == pytest.approx(6)
    logs = [math.log(value) for value in moved.multipliers.layers[Module.Q].lr_mult]
    assert logs == pytest.approx([0.3, -0.1, -0.1, -0.1])  # a mean of 0.1 removed
    entry = resolved(moved).get(Module.Q, 0)
    assert entry.lr == pytest.approx(0.01 * 6 * math.exp(0.3))
    assert resolved(moved).get(Module.K, 0).lr == 0.01


@pytest.mark.parametrize("level", LEVELS)
def test_every_dimension_moves_something_and_no_two_the_same(level: Level) -> None:
    config = proxy(**{"model.num_layers": 3})
    space = Space.of(config, level)
    hashes = {resolved(space.apply(config, {name: 0.1})).sha256 for name in space.names}
    assert len(hashes) == len(space.names)
    assert resolved(config).sha256 not in hashes


def test_radii_and_default_bounds_by_kind() -> None:
    by_name = {item.name: item for item in Space.of(proxy(), "full").dimensions}
    assert by_name["types.q.lr_mult"].radius == by_name["layers.q.eps_mult.0"].radius == 0.5
    assert by_name["types.q.init_std_mult"].radius == 0.25
    assert by_name["depth.mlp_residual_mult.0"].radius == 0.25
    assert by_name["layers.q.eps_mult.0"].high == pytest.approx(math.log(100))
    assert by_name["types.q.lr_mult"].low == pytest.approx(-math.log(10))
    assert all(item.low < 0 < item.high for item in by_name.values())


def test_bounds_by_kind_and_by_name() -> None:
    bounds = {"lr": (-1.0, 0.5), "types.k.lr_mult": (-0.1, 0.2), "one_minus_beta1": (-2.0, 2.3)}
    by_name = {item.name: item for item in Space.of(proxy(), "full", bounds).dimensions}
    assert (by_name["types.q.lr_mult"].low, by_name["types.q.lr_mult"].high) == (-1.0, 0.5)
    assert (by_name["layers.q.lr_mult.2"].low, by_name["layers.q.lr_mult.2"].high) == (-1.0, 0.5)
    assert (by_name["types.k.lr_mult"].low, by_name["types.k.lr_mult"].high) == (-0.1, 0.2)
    # A kind's bound leaves each beta the room that it has.
    assert by_name["types.q.one_minus_beta1_mult"].high < 2.3
    assert by_name["types.q.one_minus_beta1_mult"].low == -2.0


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"lr": (1.0, -1.0)}, r"bounds.lr is \[1.0, -1.0\]; expected two finite logs, the lower"),
        ({"lr": (-1.0,)}, "expected two finite logs"),
        ({"lr": (-math.inf, 1.0)}, "expected two finite logs"),
        ({"types.q.lr_mult": (0.5, 1.0)}, "leaves out 0: the base run's value"),
        ({"types.q.lr": (-1.0, 1.0)}, r"did you mean types\.q\.lr_mult"),
        ({"layers.q.lr_mult.0": (-1.0, 1.0)}, "no dimension of this model and level"),
    ],
)
def test_bad_bounds(bounds: dict[str, tuple[float, ...]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Space.of(proxy(), "types", bounds)


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ({"types.q.lr": 0.1}, r"no dimension of this space at level types; did you mean types\.q"),
        ({"types.q.lr_mult": 5.0}, r"types\.q\.lr_mult is 5\.0; expected a log in \[-2\.303, 2\.3"),
        ({"types.q.lr_mult": math.nan}, "is nan; expected a log"),
    ],
)
def test_bad_points(point: dict[str, float], message: str) -> None:
    config = proxy()
    with pytest.raises(ConfigError, match=message):
        Space.of(config, "types").apply(config, point)


def test_identity_is_plain_data_and_sees_bounds_and_level() -> None:
    config = proxy()
    identity = Space.of(config, "types").identity
    assert json.loads(json.dumps(identity)) == identity
    assert identity != Space.of(config, "types", {"eps": (-1.0, 1.0)}).identity
    assert identity != Space.of(config, "types_x_depth").identity
    assert identity == Space.of(proxy(seed=7), "types").identity


def test_distributions_are_optunas() -> None:
    optuna = pytest.importorskip("optuna")
    space = Space.of(proxy(), "types")
    found = space.distributions()
    assert list(found) == list(space.names)
    for item in space.dimensions:
        assert found[item.name] == optuna.distributions.FloatDistribution(item.low, item.high)


def test_every_multiplier_has_a_kind() -> None:
    """A multiplier that a later version adds must be given bounds and a radius."""
    names = [item.name.removesuffix("_mult") for item in fields(DepthProfiles)]
    assert all(any(name.endswith(kind) for kind in KINDS) for name in names)
