"""The noisy quadratic keeps its spread under the batch and duration rules, and under them alone."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from types import MappingProxyType
from typing import Any

import pytest

from megatron_completedp.check import quadratic, sde
from megatron_completedp.core.monomial import M_B, M_D, Monomial
from megatron_completedp.core.ratios import Ratios
from megatron_completedp.core.roles import BIAS_ROLES, Role
from megatron_completedp.core.tables import Rules, Table, build_table
from megatron_completedp.errors import ConfigError

BATCH_4 = (4.0, 1.0)

#: A spread is known to 0.4 % (4096 chains, 20 relaxation times), and the published one no better.
SAMPLING = 0.015


def changed(role: Role, column: str, factor: Monomial) -> Table:
    """The completedp table with one cell multiplied by `factor`."""
    table = build_table(Rules())
    row = table.rows[role]
    row = replace(row, **{column: getattr(row, column) * factor})
    return replace(table, rows=MappingProxyType({**table.rows, role: row}))


def spread_at_batch_4(**changes: float) -> float:
    values = sde.role_values(Rules(), Ratios(m_B=4))[Role.HIDDEN_WEIGHT]
    return quadratic.stationary_std(replace(values, **changes), quadratic.NOISE / 2)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"steps": 19}, r"steps is 19, which leaves 9\.5 at batch x 2; .* at least 20"),
        ({"batches": (0.25, 1, 4), "steps": 39}, r"leaves 9\.75 at batch x 4; .* at least 40"),
        ({"steps": 0}, "steps is 0"),
        ({"seeds": ()}, "seeds is empty; expected at least one"),
        ({"batches": (2.0, 4.0)}, r"batches is \(2\.0, 4\.0\); expected 1"),
        ({"batches": (1.0, 1.0)}, "at least one other ratio"),
    ],
)
def test_settings_that_give_no_curves_are_refused(changes: dict[str, Any], named: str) -> None:
    cheapest: dict[str, Any] = {"batches": (1.0, 2.0), "steps": 20, "seeds": (0,)}
    sde.SdeSettings(**cheapest)  # the control: it is the change that is refused
    with pytest.raises(ConfigError, match=named):
        sde.SdeSettings(**{**cheapest, **changes})


@pytest.mark.parametrize(
    ("changes", "published"),
    [
        ({}, 0.02653),
        ({"eps": 1.0}, 0.0184),
        ({"eps": 2.0}, 0.0115),
        ({"weight_decay": 0.5}, 0.0346),
        ({"weight_decay": 2.0}, 0.0191),
        ({"beta1": 0.98, "beta2": 0.99}, 0.0236),
    ],
)
def test_spread_at_four_times_the_batch(changes: dict[str, float], published: float) -> None:
    """The rule and five ways to break it, against an independent simulation of the same thing."""
    assert spread_at_batch_4(**changes) == pytest.approx(published, rel=SAMPLING)


def test_every_role_passes_and_has_numbers_of_its_own_row() -> None:
    findings = list(sde.examine(Rules(), points=[BATCH_4, (4.0, 4.0)]))
    assert all(finding.passed for finding in findings), findings
    assert set(sde.role_values(Rules(), Ratios(m_B=4))) == set(Role) - BIAS_ROLES


@pytest.mark.parametrize("role", [Role.EMBEDDING, Role.QK_NORM_GAIN, Role.UNEMBEDDING])
def test_the_wrong_eps_sign_fails_for_its_role_alone(role: Role) -> None:
    wrong = changed(role, "eps", M_D**-1 * M_B)  # m_S^1/2 becomes m_S^-1/2
    failed = [f.what for f in sde.examine(Rules(), wrong, points=[BATCH_4]) if not f.passed]
    assert len(failed) == 1
    assert f" {role} " in failed[0]


@pytest.mark.parametrize("change", [Fraction(1, 2), Fraction(-1, 2)])
@pytest.mark.parametrize("column", ["lr", "weight_decay"])
def test_half_an_exponent_of_the_batch_is_seen(column: str, change: Fraction) -> None:
    wrong = changed(Role.PRE_NORM_GAIN, column, M_B**change)
    assert not all(f.passed for f in sde.examine(Rules(), wrong, points=[BATCH_4]))


def test_duration_is_left_out_where_its_exponent_is_not_one_half() -> None:
    """The equation's argument holds for 1/2 alone; a calibrated exponent is no failure."""
    found = list(sde.examine(Rules(duration_exponent=0.4), points=[BATCH_4, (1.0, 4.0)]))
    assert found
    assert all(" m_D 1 " in finding.what and finding.passed for finding in found)
