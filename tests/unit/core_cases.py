"""Inputs that the tests of `core` share: rules, ratios, a small shape, and their strategies."""

from __future__ import annotations

from itertools import product

from hypothesis import Phase, settings
from hypothesis import strategies as st

from megatron_completedp.core.hyperparams import BaseHyperparams, Resolved
from megatron_completedp.core.monomial import Monomial
from megatron_completedp.core.multipliers import Multipliers
from megatron_completedp.core.ratios import Ratios
from megatron_completedp.core.resolve import resolve
from megatron_completedp.core.shape import ModelShape
from megatron_completedp.core.tables import PARAMETRIZATIONS, Row, Rules, Table

#: Shared machines pause for longer than hypothesis' default deadline; 30 examples keep a passing
#: run short, and leaving out the explain phase a failing one.
quick = settings(
    max_examples=30,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
)

SWITCHES = tuple(product(PARAMETRIZATIONS, ("derived", "paper"), ("paper", "invariant")))

COLUMNS = ("init_variance", "lr", "eps", "weight_decay")

SMALL = ModelShape(
    num_layers=2,
    hidden_size=8,
    ffn_hidden_size=16,
    num_attention_heads=2,
    num_query_groups=1,
    head_dim=4,
    vocab_size=10,
    vocab_multiple=8,
    seq_length=6,
)

sizes = st.floats(1 / 64, 64)
all_ratios = st.builds(Ratios, m_N=sizes, m_L=sizes, m_B=sizes, m_D=sizes)
alphas = st.floats(0.5, 1)
duration_exponents = st.floats(0, 1)
all_rules = st.builds(
    lambda switches, depth_alpha, duration_exponent: Rules(
        parametrization=switches[0],
        final_norm_eps=switches[1],
        depth_weight_decay=switches[2],
        depth_alpha=depth_alpha,
        duration_exponent=duration_exponent,
    ),
    st.sampled_from(SWITCHES),
    alphas,
    duration_exponents,
)


def row_cells(row: Row) -> dict[str, Monomial]:
    """The cells of a row by column; no init variance where the parameter starts at a constant."""
    cells = {column: getattr(row, column) for column in COLUMNS}
    return {column: cell for column, cell in cells.items() if cell is not None}


def all_cells(table: Table) -> dict[tuple[str, str], Monomial]:
    """Every cell of a table by (role, column), and the global ones by ("global", name)."""
    cells = {
        (role.value, column): cell
        for role, row in table.rows.items()
        for column, cell in row_cells(row).items()
    }
    for name in ("one_minus_beta", "residual_multiplier", "logit_multiplier"):
        cells["global", name] = getattr(table, name)
    return cells


def resolve_small(
    ratios: Ratios | None = None,
    rules: Rules | None = None,
    base: BaseHyperparams | None = None,
    multipliers: Multipliers | None = None,
) -> Resolved:
    """Resolve the small shape; what is left out takes its default."""
    return resolve(
        SMALL, ratios or Ratios(), rules or Rules(), base or BaseHyperparams(lr=3e-3), multipliers
    )
