"""Every cell of the four tables against a second transcription, written as plain arithmetic.

The functions below share no code with the tables under test; a single changed exponent makes the
comparison fail (the mutation tests at the end).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import pytest
from core_cases import COLUMNS, all_ratios, all_rules, quick
from hypothesis import given

from megatron_completedp.core.monomial import ALPHA, HALF, M_B, M_D, M_L, M_N, ONE, Monomial, P
from megatron_completedp.core.ratios import Ratios
from megatron_completedp.core.roles import Role
from megatron_completedp.core.tables import PARAMETRIZATIONS, Rules, Table, build_table

#: A handful of correctly rounded powers; one changed exponent moves a cell by more than 10 %.
RELATIVE = 1e-12

Key = tuple[str, str]
Cell = Callable[[float, float, float], float]


@dataclass(frozen=True)
class PaperRow:
    """Width and depth part of one row, functions of (m_N, m_L, alpha)."""

    init_variance: Cell | None
    lr: Cell
    eps: Cell
    weight_decay: Cell


def one(N: float, L: float, a: float) -> float:
    """A cell that moves with neither width nor depth."""
    return 1.0


HIDDEN = PaperRow(
    lambda N, L, a: 1 / N,
    lambda N, L, a: L ** (a - 1) / N,
    lambda N, L, a: 1 / (N * L**a),
    lambda N, L, a: N,
)
BRANCH_VECTOR = PaperRow(None, lambda N, L, a: L ** (a - 1), lambda N, L, a: 1 / (N * L**a), one)
PAPER: dict[str, PaperRow] = {
    "embedding": PaperRow(one, one, lambda N, L, a: 1 / N, one),
    "hidden_weight": HIDDEN,
    "branch_output_weight": HIDDEN,
    "hidden_bias": BRANCH_VECTOR,
    "pre_norm_gain": BRANCH_VECTOR,
    "qk_norm_gain": PaperRow(None, lambda N, L, a: L ** (a - 1), lambda N, L, a: L**-a, one),
    "final_norm_gain": PaperRow(None, one, lambda N, L, a: 1 / N, one),
    "unembedding": PaperRow(
        lambda N, L, a: 1 / N**2, lambda N, L, a: 1 / N, one, lambda N, L, a: N
    ),
    "unembedding_bias": PaperRow(None, one, one, one),
}
BRANCHES = ("hidden_weight", "branch_output_weight", "hidden_bias", "pre_norm_gain", "qk_norm_gain")


def paper_cells(rules: Rules, ratios: Ratios) -> dict[Key, float | None]:
    """The table of `completedp`: PAPER with its switches, times one batch-duration factor each."""
    N, L, B, D = ratios.m_N, ratios.m_L, ratios.m_B, ratios.m_D
    a, steps = rules.depth_alpha, D / B
    eta = B**0.5 / D**rules.duration_exponent
    sde = {
        "init_variance": 1.0,
        "lr": eta,
        "eps": steps**0.5,
        "weight_decay": 1 / (eta * steps),
    }
    cells: dict[Key, float | None] = {}
    for role, row in PAPER.items():
        for column in COLUMNS:
            cell = getattr(row, column)
            cells[role, column] = None if cell is None else cell(N, L, a) * sde[column]
    if rules.final_norm_eps == "paper":
        cells["final_norm_gain", "eps"] = sde["eps"]
    if rules.depth_weight_decay == "invariant":
        for role in BRANCHES:
            cells[role, "weight_decay"] *= L ** (1 - a)  # type: ignore[operator]
    return cells | {
        ("global", "one_minus_beta"): 1 / steps,
        ("global", "residual_multiplier"): L**-a,
        ("global", "logit_multiplier"): 1.0,
    }


def completep_cells(rules: Rules, ratios: Ratios) -> dict[Key, float | None]:
    """Width and depth of the paper's table, one eps everywhere, an explicit readout multiplier."""
    N, L, a = ratios.m_N, ratios.m_L, rules.depth_alpha
    cells = paper_cells(rules, Ratios(m_N=N, m_L=L))
    for role in PAPER:
        cells[role, "eps"] = 1 / (N * L**a)
    for column in ("init_variance", "lr", "weight_decay"):
        cells["unembedding", column] = 1.0
    cells["global", "logit_multiplier"] = 1 / N
    return cells


def mup_cells(rules: Rules, ratios: Ratios) -> dict[Key, float | None]:
    """The paper's table with m_L = m_B = m_D = 1."""
    return paper_cells(rules, Ratios(m_N=ratios.m_N))


def sp_cells(rules: Rules, ratios: Ratios) -> dict[Key, float | None]:
    """Ones, but for the std L^-1/2 of o and mlp down."""
    cells = {key: 1.0 if v is not None else None for key, v in paper_cells(rules, ratios).items()}
    cells["branch_output_weight", "init_variance"] = (ratios.m_L**-0.5) ** 2
    return cells


TRANSCRIPTIONS = {
    "sp": sp_cells,
    "mup": mup_cells,
    "completep": completep_cells,
    "completedp": paper_cells,
}


def mismatches(table: Table, rules: Rules, ratios: Ratios) -> set[Key]:
    """The cells of `table` whose value is not the transcription's."""
    cells: dict[Key, Monomial | None] = {
        (role.value, column): getattr(row, column)
        for role, row in table.rows.items()
        for column in COLUMNS
    }
    for name in ("one_minus_beta", "residual_multiplier", "logit_multiplier"):
        cells["global", name] = getattr(table, name)
    expected = TRANSCRIPTIONS[rules.parametrization](rules, ratios)
    assert cells.keys() == expected.keys()
    alpha, p = rules.depth_alpha, rules.duration_exponent
    got = {key: None if cell is None else cell.at(ratios, alpha, p) for key, cell in cells.items()}
    return {key for key, value in got.items() if not agree(value, expected[key])}


def agree(value: float | None, expected: float | None) -> bool:
    """Whether two cells are the same number, or both absent."""
    if value is None or expected is None:
        return value is expected
    return math.isclose(value, expected, rel_tol=RELATIVE)


@quick
@given(all_rules, all_ratios)
def test_every_cell_is_the_papers(rules: Rules, ratios: Ratios) -> None:
    assert mismatches(build_table(rules), rules, ratios) == set()


def test_batch_and_duration_factors_are_powers_of_the_step_ratio_at_the_papers_exponent() -> None:
    """At p = 1/2 the general form is the printed m_S^-1/2, m_S^1/2 and m_S^-1."""
    cells = paper_cells(Rules(), Ratios(m_B=3, m_D=48))  # m_S = 16
    assert cells["embedding", "lr"] == pytest.approx(1 / 4)
    assert cells["embedding", "weight_decay"] == pytest.approx(1 / 4)
    assert cells["embedding", "eps"] == pytest.approx(4)
    assert cells["global", "one_minus_beta"] == pytest.approx(1 / 16)


#: Distinct primes and symbols away from 0, 1/2 and 1: no mutation hides in a coincidence.
PROBE = Ratios(m_N=2, m_L=3, m_B=5, m_D=7)
PROBE_SYMBOLS = {"depth_alpha": 0.75, "duration_exponent": 0.3}
MUTATIONS = {
    "m_N": M_N**HALF,
    "m_L": M_L**HALF,
    "m_B": M_B**HALF,
    "m_D": M_D**HALF,
    "alpha": M_L**ALPHA,
    "p": M_D**P,
}
ROW_CELLS = [(role, column) for role in Role for column in COLUMNS]
GLOBAL_CELLS = ["one_minus_beta", "residual_multiplier", "logit_multiplier"]


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
@pytest.mark.parametrize(("role", "column"), ROW_CELLS)
def test_a_changed_cell_is_noticed(name: str, role: Role, column: str) -> None:
    """Negative control: each exponent of each cell, one at a time, and a constant start too."""
    rules = Rules(parametrization=name, **PROBE_SYMBOLS)
    table = build_table(rules)
    cell = getattr(table.rows[role], column)
    mutants = [ONE] if cell is None else [cell * mutation for mutation in MUTATIONS.values()]
    for mutant in mutants:
        rows: Mapping[Role, object] = {
            **table.rows,
            role: replace(table.rows[role], **{column: mutant}),
        }
        mutated = replace(table, rows=MappingProxyType(rows))
        assert mismatches(mutated, rules, PROBE) == {(role.value, column)}


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
@pytest.mark.parametrize("field", GLOBAL_CELLS)
def test_a_changed_global_factor_is_noticed(name: str, field: str) -> None:
    rules = Rules(parametrization=name, **PROBE_SYMBOLS)
    table = build_table(rules)
    for mutation in MUTATIONS.values():
        mutated = replace(table, **{field: getattr(table, field) * mutation})
        assert mismatches(mutated, rules, PROBE) == {("global", field)}


@pytest.mark.parametrize(
    ("name", "switch", "value", "affected"),
    [
        ("completedp", "final_norm_eps", "paper", {("final_norm_gain", "eps")}),
        ("mup", "final_norm_eps", "paper", {("final_norm_gain", "eps")}),
        ("completep", "final_norm_eps", "paper", set()),
        ("sp", "final_norm_eps", "paper", set()),
        (
            "completedp",
            "depth_weight_decay",
            "invariant",
            {(role, "weight_decay") for role in BRANCHES},
        ),
        (
            "completep",
            "depth_weight_decay",
            "invariant",
            {(role, "weight_decay") for role in BRANCHES},
        ),
        ("mup", "depth_weight_decay", "invariant", set()),
        ("sp", "depth_weight_decay", "invariant", set()),
    ],
)
def test_a_switch_touches_its_cells_and_no_others(
    name: str, switch: str, value: str, affected: set[Key]
) -> None:
    default = Rules(parametrization=name, **PROBE_SYMBOLS)
    switched = build_table(replace(default, **{switch: value}))
    assert mismatches(switched, default, PROBE) == affected
