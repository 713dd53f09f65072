"""The numbers that a run trains with: at its base, and of every (module, layer), explained."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

from megatron_completedp.core.ratios import Ratios
from megatron_completedp.core.roles import Module, Role
from megatron_completedp.core.tables import Rules
from megatron_completedp.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BaseHyperparams:
    """The values tuned at the base shape."""

    lr: float
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decoupled weight decay (PyTorch convention) of matrices."""
    gain_weight_decay: float = 0.0
    """Decoupled weight decay of norm gains; normally none."""
    eps: float = 1e-8
    """Adam's eps."""
    beta1: float = 0.9
    """Decay of Adam's first moment."""
    beta2: float = 0.95
    """Decay of Adam's second moment."""
    embedding_init_std: float = 0.02
    """Standard deviation of the initial embedding."""
    hidden_init_std: float = 0.02
    """Standard deviation of the initial hidden weights."""
    unembedding_init_std: float = 0.02
    """Standard deviation of the initial unembedding."""

    def __post_init__(self) -> None:
        for item in fields(self):
            name, value = f"hyperparams.{item.name}", getattr(self, item.name)
            if item.name in ("beta1", "beta2"):
                if not 0 < value < 1:
                    raise ConfigError(f"{name} is {value}; expected a value in (0, 1).")
            elif item.name in ("weight_decay", "gain_weight_decay"):
                if not 0 <= value < math.inf:
                    raise ConfigError(f"{name} is {value}; expected 0 or more.")
            elif not 0 < value < math.inf:
                raise ConfigError(f"{name} is {value}; expected a positive number.")


@dataclass(frozen=True, kw_only=True)
class Factors:
    """One number explained: base * type * depth * m_N * m_L * m_B * m_D, in that order."""

    base: float
    type: float = 1.0
    """The module type's multiplier."""
    depth: float = 1.0
    """The multiplier at this layer: the shared profile's times the module's own."""
    m_N: float = 1.0
    m_L: float = 1.0
    m_B: float = 1.0
    m_D: float = 1.0
    rule: str = "1"
    """The table's cell as a formula."""

    @property
    def tuned(self) -> float:
        """The value at the base shape: base * type * depth."""
        return self.base * self.type * self.depth

    @property
    def value(self) -> float:
        """The product; bit for bit `base` where every factor is 1."""
        return self.tuned * self.m_N * self.m_L * self.m_B * self.m_D


@dataclass(frozen=True, kw_only=True)
class ResolvedHyperparams:
    """What one module in one layer trains with, and where each number comes from."""

    module: Module
    layer: int | None
    """Layer from 0; None outside the stack."""
    role: Role
    lr: float
    """Peak learning rate."""
    weight_decay: float
    eps: float
    beta1: float
    beta2: float
    init_std: float | None
    """None for gains, which start at 1."""
    factors: Mapping[str, Factors]
    """By hyperparameter: lr, weight_decay, eps, one_minus_beta1, one_minus_beta2, init_std."""

    @property
    def optimizer_values(self) -> tuple[float, float, float, float, float]:
        """(lr, weight_decay, eps, beta1, beta2): equal tuples may share a parameter group."""
        return (self.lr, self.weight_decay, self.eps, self.beta1, self.beta2)


@dataclass(frozen=True, kw_only=True)
class ResidualMultiplier:
    """h <- h + multiplier * F(norm(h)) for the two branches of one layer (from 0)."""

    layer: int
    attention: float
    mlp: float


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """Every number a run trains with. `resolve` builds it; plan, logs and checkpoints carry it."""

    rules: Rules
    ratios: Ratios
    modules: tuple[ResolvedHyperparams, ...]
    residual: tuple[ResidualMultiplier, ...]
    logit_multiplier: float
    notes: tuple[str, ...]
    """Where a documented fallback replaced a rule."""

    def get(self, module: Module, layer: int | None) -> ResolvedHyperparams:
        """The entry of one module; `layer` is None outside the stack. KeyError if absent."""
        return self._index[module, layer]

    @cached_property
    def _index(self) -> dict[tuple[Module, int | None], ResolvedHyperparams]:
        return {(entry.module, entry.layer): entry for entry in self.modules}

    def as_json(self) -> dict[str, Any]:
        """Plain data with the field names of the `plan --json` schema."""
        return {
            "parametrization": self.rules.parametrization,
            "depth_alpha": self.rules.depth_alpha,
            "duration_exponent": self.rules.duration_exponent,
            "final_norm_eps": self.rules.final_norm_eps,
            "depth_weight_decay": self.rules.depth_weight_decay,
            "ratios": asdict(self.ratios),
            "modules": [
                {
                    "module": entry.module.value,
                    "layer": entry.layer,
                    "role": entry.role.value,
                    "lr": entry.lr,
                    "weight_decay": entry.weight_decay,
                    "eps": entry.eps,
                    "beta1": entry.beta1,
                    "beta2": entry.beta2,
                    "init_std": entry.init_std,
                    "factors": {name: vars(f) for name, f in entry.factors.items()},
                }
                for entry in self.modules
            ],
            "residual": [asdict(entry) for entry in self.residual],
            "logit_multiplier": self.logit_multiplier,
            "notes": list(self.notes),
        }

    @property
    def sha256(self) -> str:
        """Hash of every number above: equal hashes train with equal hyperparameters."""
        text = json.dumps(self.as_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()
