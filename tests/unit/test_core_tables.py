"""Contract of the four tables, and the quantities that Complete(d)P conserves."""

from __future__ import annotations

import math

import pytest
from core_cases import SWITCHES, all_cells, all_ratios, all_rules, alphas, quick, sizes
from hypothesis import given
from hypothesis import strategies as st

from megatron_completedp.core.ratios import Ratios
from megatron_completedp.core.roles import BIAS_ROLES, GAIN_ROLES, Role
from megatron_completedp.core.tables import IN_BRANCH, Rules, build_table
from megatron_completedp.errors import ConfigError

#: Every value is a product of a few correctly rounded powers; their errors stay below 1e-14.
RELATIVE = 1e-12

UPSTREAM_OF_READOUT = frozenset(Role) - {
    Role.UNEMBEDDING,
    Role.UNEMBEDDING_BIAS,
    Role.QK_NORM_GAIN,  # upstream too, but it sums over ~N heads
}


def values(rules: Rules, ratios: Ratios) -> dict[tuple[str, str], float]:
    """Every cell of the table of `rules` as a number."""
    alpha, p = rules.depth_alpha, rules.duration_exponent
    return {key: cell.at(ratios, alpha, p) for key, cell in all_cells(build_table(rules)).items()}


def times(a: Ratios, b: Ratios) -> Ratios:
    """The ratios of two moves, one after the other."""
    return Ratios(m_N=a.m_N * b.m_N, m_L=a.m_L * b.m_L, m_B=a.m_B * b.m_B, m_D=a.m_D * b.m_D)


@quick
@given(all_rules)
def test_identity(rules: Rules) -> None:
    assert set(values(rules, Ratios()).values()) == {1.0}


@quick
@given(all_rules, all_ratios, all_ratios)
def test_composition(rules: Rules, first: Ratios, second: Ratios) -> None:
    one, two = values(rules, first), values(rules, second)
    for key, both in values(rules, times(first, second)).items():
        assert both == pytest.approx(one[key] * two[key], rel=RELATIVE), key


@quick
@given(all_rules, all_ratios)
def test_positive_and_finite(rules: Rules, ratios: Ratios) -> None:
    assert all(0 < value < math.inf for value in values(rules, ratios).values())


@pytest.mark.parametrize("switches", SWITCHES)
def test_every_role_has_a_row_and_only_weights_have_an_init_variance(
    switches: tuple[str, str, str],
) -> None:
    name, final_norm_eps, depth_weight_decay = switches
    rules = Rules(
        parametrization=name,
        final_norm_eps=final_norm_eps,
        depth_weight_decay=depth_weight_decay,
    )
    rows = build_table(rules).rows
    assert set(rows) == set(Role)
    for role, row in rows.items():
        assert (row.init_variance is None) == (role in GAIN_ROLES | BIAS_ROLES), role


completedp = st.builds(
    Rules,
    depth_alpha=alphas,
    duration_exponent=st.floats(0, 1),
    final_norm_eps=st.sampled_from(["derived", "paper"]),
    depth_weight_decay=st.sampled_from(["paper", "invariant"]),
)


@quick
@given(completedp, all_ratios)
def test_decay_over_the_run_is_conserved(rules: Rules, ratios: Ratios) -> None:
    """The product eta * lambda * steps moves with depth alone, and only as the switch says."""
    got = values(rules, ratios)
    for role in Role:
        paper = rules.depth_weight_decay == "paper" and role in IN_BRANCH
        depth = ratios.m_L ** (rules.depth_alpha - 1) if paper else 1.0
        conserved = got[role, "lr"] * got[role, "weight_decay"] * ratios.m_S
        assert conserved == pytest.approx(depth, rel=RELATIVE), role


@quick
@given(completedp, all_ratios)
def test_averaging_window_over_the_run_is_conserved(rules: Rules, ratios: Ratios) -> None:
    window = values(rules, ratios)["global", "one_minus_beta"] * ratios.m_S
    assert window == pytest.approx(1, rel=RELATIVE)


@quick
@given(completedp, sizes, sizes)
def test_eps_follows_the_gradient(rules: Rules, m_N: float, m_L: float) -> None:
    """Per-coordinate gradients: 1/N upstream of the readout, L^-alpha inside a branch."""
    got = values(rules, Ratios(m_N=m_N, m_L=m_L))
    for role in Role:
        gradient = 1 / m_N if role in UPSTREAM_OF_READOUT else 1.0
        if role is Role.FINAL_NORM_GAIN and rules.final_norm_eps == "paper":
            gradient = 1.0  # as transcribed; measured gradients say 1/N
        if role in IN_BRANCH:
            gradient *= m_L**-rules.depth_alpha
        assert got[role, "eps"] == pytest.approx(gradient, rel=RELATIVE), role


@quick
@given(completedp, sizes)
def test_batch_at_fixed_tokens_keeps_the_sde(rules: Rules, kappa: float) -> None:
    """eta, lambda x sqrt(kappa); eps / sqrt(kappa), as the noise; 1 - beta x kappa; at any p."""
    got = values(rules, Ratios(m_B=kappa))
    root = math.sqrt(kappa)
    expected = {"init_variance": 1, "lr": root, "weight_decay": root, "eps": 1 / root}
    expected |= {"one_minus_beta": kappa, "residual_multiplier": 1, "logit_multiplier": 1}
    for key, value in got.items():
        assert value == pytest.approx(expected[key[1]], rel=RELATIVE), key


@quick
@given(sizes)
def test_growing_tokens_by_the_batch_alone_changes_nothing(kappa: float) -> None:
    for key, value in values(Rules(), Ratios(m_B=kappa, m_D=kappa)).items():
        assert value == pytest.approx(1, rel=RELATIVE), key


@quick
@given(sizes, st.floats(0, 1))
def test_duration_exponent_is_the_learning_rates(m_D: float, p: float) -> None:
    got = values(Rules(duration_exponent=p), Ratios(m_D=m_D))
    for role in Role:
        assert got[role, "lr"] == pytest.approx(m_D**-p, rel=RELATIVE)
        assert got[role, "weight_decay"] == pytest.approx(m_D ** (p - 1), rel=RELATIVE)
        assert got[role, "eps"] == pytest.approx(math.sqrt(m_D), rel=RELATIVE)


def test_depth_weight_decay_switches_coincide_at_alpha_one_only() -> None:
    def table(alpha: float, switch: str) -> dict[tuple[str, str], float]:
        return values(Rules(depth_alpha=alpha, depth_weight_decay=switch), Ratios(m_L=4, m_N=2))

    assert table(1.0, "paper") == table(1.0, "invariant")
    assert table(0.75, "paper") != table(0.75, "invariant")


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("parametrization", "completedP", "sp, mup, completep, completedp"),
        ("final_norm_eps", "Paper", "derived, paper"),
        ("depth_weight_decay", "derived", "paper, invariant"),
        ("depth_alpha", 0.4, r"\[0.5, 1\]"),
        ("depth_alpha", math.nan, r"\[0.5, 1\]"),
        ("duration_exponent", -0.1, r"\[0, 1\]"),
    ],
)
def test_bad_rules_name_the_field_the_value_and_the_choices(
    field: str, value: object, expected: str
) -> None:
    with pytest.raises(ConfigError, match=f"{field} is {value!r}; expected .*{expected}"):
        Rules(**{field: value})
