"""From base hyperparameters and ratios to the numbers every (module, layer) trains with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType

from megatron_completedp.core.hyperparams import (
    BaseHyperparams,
    Factors,
    ResidualMultiplier,
    Resolved,
    ResolvedHyperparams,
)
from megatron_completedp.core.monomial import HALF, Monomial
from megatron_completedp.core.multipliers import Multipliers
from megatron_completedp.core.ratios import Ratios
from megatron_completedp.core.roles import GAIN_ROLES, MODULE_ROLES, OUTSIDE_STACK, Module, Role
from megatron_completedp.core.shape import ModelShape
from megatron_completedp.core.tables import Rules, Table, build_table
from megatron_completedp.errors import ConfigError, HyperparamError

#: From this (1 - beta) * kappa on, the table's linear rule for 1 - beta gives way to beta^kappa.
BETA_FALLBACK = 0.5


def resolve(
    shape: ModelShape,
    ratios: Ratios,
    rules: Rules,
    base: BaseHyperparams,
    multipliers: Multipliers | None = None,
    *,
    table: Table | None = None,
) -> Resolved:
    """Resolve the hyperparameters of every (module, layer) of a model of `shape`.

    value = base * type[module] * depth[module, layer] * cell[role](ratios), with type and depth
    from `multipliers` and the cells from the table.

    `table` replaces the one that `rules` select: the checks hand in wrong ones, to see them fail.

    Raises ConfigError for tied embeddings under rules that treat the two ends apart and for
    multipliers of modules the model lacks, HyperparamError for a beta that leaves (0, 1).
    """
    multipliers = multipliers or Multipliers()
    table = table or build_table(rules)
    _check_tied(shape, table, base)
    _check_modules(shape, multipliers)
    resolver = _Resolver(
        rules=rules,
        ratios=ratios,
        table=table,
        base=base,
        multipliers=multipliers.to_depth(shape.num_layers),
    )
    entries = tuple(
        resolver.module(module, layer)
        for module in shape.modules
        for layer in ((None,) if module in OUTSIDE_STACK else range(shape.num_layers))
    )
    return Resolved(
        rules=rules,
        ratios=ratios,
        modules=entries,
        residual=tuple(resolver.residual(layer) for layer in range(shape.num_layers)),
        logit_multiplier=table.logit_multiplier.at(
            ratios, rules.depth_alpha, rules.duration_exponent
        ),
        notes=tuple(dict.fromkeys(note for e in entries for note in _beta_notes(e))),
    )


@dataclass(frozen=True, kw_only=True)
class _Resolver:
    """The inputs of `resolve`, held once for all modules."""

    rules: Rules
    ratios: Ratios
    table: Table
    base: BaseHyperparams
    multipliers: Multipliers
    """Already at the target's depth."""

    def module(self, module: Module, layer: int | None) -> ResolvedHyperparams:
        role = MODULE_ROLES[module]
        row, base = self.table.rows[role], self.base
        decay = base.gain_weight_decay if role in GAIN_ROLES else base.weight_decay
        cells = {
            "lr": (base.lr, "lr_mult", row.lr),
            "weight_decay": (decay, "weight_decay_mult", row.weight_decay),
            "eps": (base.eps, "eps_mult", row.eps),
            "one_minus_beta1": (1 - base.beta1, "one_minus_beta1_mult", self.table.one_minus_beta),
            "one_minus_beta2": (1 - base.beta2, "one_minus_beta2_mult", self.table.one_minus_beta),
        }
        if row.init_variance is not None:
            std = {
                Role.EMBEDDING: base.embedding_init_std,
                Role.UNEMBEDDING: base.unembedding_init_std,
            }.get(role, base.hidden_init_std)
            cells["init_std"] = (std, "init_std_mult", row.init_variance**HALF)
        factors = {
            name: self._factors(value, mult, module, layer, cell)
            for name, (value, mult, cell) in cells.items()
        }
        place = module.value if layer is None else f"{module} in layer {layer}"
        return ResolvedHyperparams(
            module=module,
            layer=layer,
            role=role,
            lr=factors["lr"].value,
            weight_decay=factors["weight_decay"].value,
            eps=factors["eps"].value,
            beta1=_beta(f"beta1 of {place}", base.beta1, factors["one_minus_beta1"]),
            beta2=_beta(f"beta2 of {place}", base.beta2, factors["one_minus_beta2"]),
            init_std=factors["init_std"].value if "init_std" in factors else None,
            factors=MappingProxyType(factors),
        )

    def residual(self, layer: int) -> ResidualMultiplier:
        multipliers = self.multipliers
        rule = self.table.residual_multiplier.at(
            self.ratios, self.rules.depth_alpha, self.rules.duration_exponent
        )
        return ResidualMultiplier(
            layer=layer,
            attention=multipliers.attention_residual_mult
            * multipliers.depth.factor("attention_residual_mult", layer)
            * rule,
            mlp=multipliers.mlp_residual_mult
            * multipliers.depth.factor("mlp_residual_mult", layer)
            * rule,
        )

    def _factors(
        self, base: float, mult: str, module: Module, layer: int | None, cell: Monomial
    ) -> Factors:
        rules = self.rules
        return Factors(
            base=base,
            type=getattr(self.multipliers.of(module), mult),
            depth=self.multipliers.layer_factor(module, mult, layer),
            rule=str(cell),
            **cell.factors(self.ratios, rules.depth_alpha, rules.duration_exponent),
        )


def _beta(name: str, base: float, one_minus: Factors) -> float:
    """Scale a beta: linear rule on 1 - beta, or beta^kappa once that is no longer small.

    The two agree to first order; the linear one is meaningless once (1 - beta) * kappa reaches 1.
    """
    if _uses_power_rule(one_minus):
        tuned = 1 - one_minus.tuned
        beta = tuned ** _kappa(one_minus) if 0 < tuned < 1 else tuned
    elif one_minus.value == one_minus.base:
        beta = base  # 1 - (1 - beta) would move the last bit of a beta below 1/2
    else:
        beta = 1 - one_minus.value
    if not 0 < beta < 1:
        raise HyperparamError(
            f"{name} becomes {beta:g}: 1 - beta = {one_minus.base:g} at the base, times "
            f"{one_minus.type * one_minus.depth:g} from the multipliers, times "
            f"{_kappa(one_minus):g} from batch and duration. Expected a value in (0, 1); lower "
            "the one_minus_beta multiplier or choose a batch and duration nearer to the base's."
        )
    return beta


def _kappa(one_minus: Factors) -> float:
    return one_minus.m_N * one_minus.m_L * one_minus.m_B * one_minus.m_D


def _uses_power_rule(one_minus: Factors) -> bool:
    # Both tests allow for rounding: 49 * (1/49) is not 1, and (1 - 0.9) * 5 falls short of 0.5.
    moved = not math.isclose(_kappa(one_minus), 1)
    return moved and one_minus.value > BETA_FALLBACK - 1e-9


def _beta_notes(entry: ResolvedHyperparams) -> list[str]:
    notes = []
    for name in ("beta1", "beta2"):
        one_minus = entry.factors[f"one_minus_{name}"]
        if _uses_power_rule(one_minus):
            notes.append(
                f"{name}: (1 - {name}) * kappa = {one_minus.value:.3g} is at least "
                f"{BETA_FALLBACK}, so {name}^kappa = {getattr(entry, name):.4g} replaces the "
                f"linear rule (kappa = m_B/m_D = {_kappa(one_minus):g})."
            )
    return notes


def _check_tied(shape: ModelShape, table: Table, base: BaseHyperparams) -> None:
    if not shape.tied_embeddings:
        return
    if table.rows[Role.EMBEDDING] != table.rows[Role.UNEMBEDDING]:
        raise ConfigError(
            "model.tied_embeddings is on, but this parametrization treats the embedding and the "
            "unembedding differently and one weight cannot follow both rows. Untie them, or use "
            "completep or sp, whose two rows agree."
        )
    if base.embedding_init_std != base.unembedding_init_std:
        raise ConfigError(
            f"model.tied_embeddings is on with embedding_init_std {base.embedding_init_std} and "
            f"unembedding_init_std {base.unembedding_init_std}; one weight has one std. Make them "
            "equal."
        )


def _check_modules(shape: ModelShape, multipliers: Multipliers) -> None:
    for section in ("types", "layers"):
        unknown = [name for name in getattr(multipliers, section) if name not in shape.modules]
        if unknown:
            raise ConfigError(
                f"multipliers.{section} names {', '.join(unknown)}, which this model lacks; its "
                f"modules are {', '.join(shape.modules)}."
            )
