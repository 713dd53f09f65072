"""The four parametrizations as tables: rows are roles, columns hyperparameters, cells monomials.

Source: arXiv 2512.22382, Table 1 (Complete(d)P); arXiv 2505.01618 (CompleteP); Yang et al. 2022
(muP). Every cell multiplies the value tuned at the base, so at the base shape every cell is 1.
AdamW in the PyTorch convention: theta <- theta - eta * (direction + lambda * theta).

The derivation in one paragraph. With unembedding entries of size 1/N, the gradient of the
unembedding is O(1) and everything upstream of it O(1/N); inside a residual branch it also carries
m_L^-alpha. Adam's eps must scale like the gradient: the eps column. Matrices with growing fan-in
add coherently over N, vectors do not; 2L branches add coherently through m_L^-alpha: the
learning-rate column. Batch and duration keep the SDE of Adam: steps * eta^2, eta * lambda * steps,
eps / sigma and (1 - beta) * steps are conserved (Malladi et al. 2022).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from megatron_completedp.core.monomial import ALPHA, HALF, M_B, M_D, M_L, M_N, M_S, ONE, Monomial, P
from megatron_completedp.core.roles import Role
from megatron_completedp.errors import ConfigError

Parametrization = Literal["sp", "mup", "completep", "completedp"]
PARAMETRIZATIONS: tuple[Parametrization, ...] = ("sp", "mup", "completep", "completedp")

#: Roles inside a residual branch: they carry the depth rule.
IN_BRANCH: frozenset[Role] = frozenset(
    {
        Role.HIDDEN_WEIGHT,
        Role.BRANCH_OUTPUT_WEIGHT,
        Role.HIDDEN_BIAS,
        Role.PRE_NORM_GAIN,
        Role.QK_NORM_GAIN,
    }
)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Which parametrization, and the recorded choices inside it."""

    parametrization: Parametrization = "completedp"
    """One word selects init, multipliers and optimizer rules together."""
    depth_alpha: float = 1.0
    """Depth exponent alpha in [1/2, 1]: residual branches are scaled by m_L^-alpha."""
    duration_exponent: float = 0.5
    """p in eta ~ m_B^1/2 m_D^-p; 1/2 is the paper's. Decay keeps eta * lambda * steps."""
    final_norm_eps: Literal["derived", "paper"] = "derived"
    """eps of the final-norm gain: derived (m_N^-1) or as transcribed from the paper (no m_N)."""
    depth_weight_decay: Literal["paper", "invariant"] = "paper"
    """Decay in branches: paper (no m_L) or invariant (x m_L^(1-alpha)); equal at alpha = 1."""

    def __post_init__(self) -> None:
        for name, words in (
            ("parametrization", PARAMETRIZATIONS),
            ("final_norm_eps", ("derived", "paper")),
            ("depth_weight_decay", ("paper", "invariant")),
        ):
            word = getattr(self, name)
            if word not in words:
                raise ConfigError(f"{name} is {word!r}; expected one of {', '.join(words)}.")
        if not 0.5 <= self.depth_alpha <= 1:
            raise ConfigError(f"depth_alpha is {self.depth_alpha}; expected a value in [0.5, 1].")
        if not 0 <= self.duration_exponent <= 1:
            raise ConfigError(
                f"duration_exponent is {self.duration_exponent}; expected a value in [0, 1] "
                "(0.5 is the paper's)."
            )


@dataclass(frozen=True, kw_only=True)
class Row:
    """One role's factors; `init_variance` is None where the parameter starts at a constant."""

    init_variance: Monomial | None
    lr: Monomial
    eps: Monomial
    weight_decay: Monomial

    def restricted(self, symbols: tuple[str, ...]) -> Row:
        """The row with every ratio outside `symbols` set to 1."""
        return Row(
            init_variance=self.init_variance and self.init_variance.restricted(symbols),
            lr=self.lr.restricted(symbols),
            eps=self.eps.restricted(symbols),
            weight_decay=self.weight_decay.restricted(symbols),
        )


@dataclass(frozen=True, kw_only=True)
class Table:
    """A parametrization: its rows by role, and the factors that belong to no single tensor."""

    rows: Mapping[Role, Row]
    one_minus_beta: Monomial
    """On 1 - beta1 and 1 - beta2 of every parameter."""
    residual_multiplier: Monomial
    """On both branches of every layer: h <- h + multiplier * F(norm(h))."""
    logit_multiplier: Monomial
    """On the logits."""

    def restricted(self, symbols: tuple[str, ...]) -> Table:
        """The table with every ratio outside `symbols` set to 1."""
        return Table(
            rows=MappingProxyType({r: row.restricted(symbols) for r, row in self.rows.items()}),
            one_minus_beta=self.one_minus_beta.restricted(symbols),
            residual_multiplier=self.residual_multiplier.restricted(symbols),
            logit_multiplier=self.logit_multiplier.restricted(symbols),
        )


def build_table(rules: Rules) -> Table:
    """The table that `rules` select."""
    builders = {"sp": _sp, "mup": _mup, "completep": _completep, "completedp": _completedp}
    return builders[rules.parametrization](rules)


def _completedp(rules: Rules) -> Table:
    # Batch and duration: at the paper's p = 1/2 these are m_S^-1/2, m_S^-1/2 and m_S^1/2.
    lr_sde = M_B**HALF * M_D**-P
    decay_sde = M_B**HALF * M_D ** (P - 1)
    eps_sde = M_S**HALF
    branch_lr = M_L ** (ALPHA - 1)
    branch_eps = M_L**-ALPHA
    branch_decay = M_L ** (1 - ALPHA) if rules.depth_weight_decay == "invariant" else ONE
    final_norm_eps = M_N**-1 if rules.final_norm_eps == "derived" else ONE

    hidden_weight = Row(
        init_variance=M_N**-1,
        lr=M_N**-1 * branch_lr * lr_sde,
        eps=M_N**-1 * branch_eps * eps_sde,
        weight_decay=M_N * branch_decay * decay_sde,
    )
    hidden_vector = Row(
        init_variance=None,
        lr=branch_lr * lr_sde,
        eps=M_N**-1 * branch_eps * eps_sde,
        weight_decay=branch_decay * decay_sde,
    )
    rows = {
        Role.EMBEDDING: Row(
            init_variance=ONE, lr=lr_sde, eps=M_N**-1 * eps_sde, weight_decay=decay_sde
        ),
        Role.HIDDEN_WEIGHT: hidden_weight,
        Role.BRANCH_OUTPUT_WEIGHT: hidden_weight,
        Role.HIDDEN_BIAS: hidden_vector,
        Role.PRE_NORM_GAIN: hidden_vector,
        # One vector shared by all heads: its gradient sums over ~N terms of size 1/N.
        Role.QK_NORM_GAIN: replace(hidden_vector, eps=branch_eps * eps_sde),
        Role.FINAL_NORM_GAIN: Row(
            init_variance=None,
            lr=lr_sde,
            eps=final_norm_eps * eps_sde,
            weight_decay=decay_sde,
        ),
        # The readout multiplier 1/m_N absorbed by symmetry: init m_N^-2, LR m_N^-1, decay m_N.
        Role.UNEMBEDDING: Row(
            init_variance=M_N**-2,
            lr=M_N**-1 * lr_sde,
            eps=eps_sde,
            weight_decay=M_N * decay_sde,
        ),
        Role.UNEMBEDDING_BIAS: Row(
            init_variance=None, lr=lr_sde, eps=eps_sde, weight_decay=decay_sde
        ),
    }
    return Table(
        rows=MappingProxyType(rows),
        one_minus_beta=M_S**-1,
        residual_multiplier=M_L**-ALPHA,
        logit_multiplier=ONE,
    )


def _completep(rules: Rules) -> Table:
    """CompleteP as released: one eps for every tensor, and an explicit readout multiplier."""
    table = _completedp(rules).restricted(("m_N", "m_L"))
    eps = M_N**-1 * M_L**-ALPHA
    rows = {role: replace(row, eps=eps) for role, row in table.rows.items()}
    rows[Role.UNEMBEDDING] = Row(init_variance=ONE, lr=ONE, eps=eps, weight_decay=ONE)
    return replace(table, rows=MappingProxyType(rows), logit_multiplier=M_N**-1)


def _mup(rules: Rules) -> Table:
    """The width column alone: m_L = m_B = m_D = 1 and no depth multiplier."""
    return _completedp(rules).restricted(("m_N",))


def _sp(rules: Rules) -> Table:
    """Megatron's defaults: nothing scales but the init of o and mlp down, 1/sqrt(2L)."""
    table = _completedp(rules).restricted(())
    rows = dict(table.rows)
    rows[Role.BRANCH_OUTPUT_WEIGHT] = replace(
        rows[Role.BRANCH_OUTPUT_WEIGHT], init_variance=M_L**-1
    )
    return replace(table, rows=MappingProxyType(rows))
