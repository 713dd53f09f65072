"""Per-module multipliers: type x depth, the part of a hyperparameter that the search finds.

Section 4 of the rules: log zeta[module, layer] = log type[module] + log depth[layer] + ... A value
of 1 everywhere is "global hyperparameters only".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType

from megatron_completedp.core.roles import GAIN_ROLES, MODULE_ROLES, Module
from megatron_completedp.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ModuleMultipliers:
    """Dimensionless factors on one module type's hyperparameters."""

    lr_mult: float = 1.0
    """On the learning rate."""
    weight_decay_mult: float = 1.0
    """On the weight decay."""
    one_minus_beta1_mult: float = 1.0
    """On 1 - beta1."""
    one_minus_beta2_mult: float = 1.0
    """On 1 - beta2."""
    eps_mult: float = 1.0
    """On Adam's eps."""
    init_std_mult: float = 1.0
    """On the standard deviation of the initial weights; 1 for gains, which have none."""

    def __post_init__(self) -> None:
        for item in fields(self):
            _require_positive(f"multipliers: {item.name}", getattr(self, item.name))


@dataclass(frozen=True, kw_only=True)
class DepthProfiles:
    """One factor per base layer for each hyperparameter; empty means 1 at every layer.

    At another depth a profile is read at (l + 1/2)/L by linear interpolation in log space, clamped
    at the ends, and rescaled so that its geometric mean is 1.
    """

    lr_mult: tuple[float, ...] = ()
    weight_decay_mult: tuple[float, ...] = ()
    one_minus_beta1_mult: tuple[float, ...] = ()
    one_minus_beta2_mult: tuple[float, ...] = ()
    eps_mult: tuple[float, ...] = ()
    init_std_mult: tuple[float, ...] = ()
    attention_residual_mult: tuple[float, ...] = ()
    mlp_residual_mult: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for item in fields(self):
            for value in getattr(self, item.name):
                _require_positive(f"multipliers.depth.{item.name}", value)

    def check_depth(self, num_layers: int) -> None:
        """Raise ConfigError unless every profile has one factor for each base layer, or none.

        A profile of another length would be taken for one that was tuned at that depth.
        """
        for item in fields(self):
            profile = getattr(self, item.name)
            if profile and len(profile) != num_layers:
                raise ConfigError(
                    f"multipliers.depth.{item.name} has {len(profile)} factors; expected one for "
                    f"each of the base's {num_layers} layers. Give the profile as it was tuned at "
                    "the base (it moves to this model's depth by itself), or leave it empty."
                )

    def to_depth(self, num_layers: int) -> DepthProfiles:
        """The same profiles at `num_layers` layers."""
        return DepthProfiles(
            **{
                item.name: interpolate_profile(profile, num_layers)
                for item in fields(self)
                if (profile := getattr(self, item.name))
            }
        )

    def factor(self, name: str, layer: int | None) -> float:
        """The factor on hyperparameter `name` at `layer`; 1 outside the stack (None)."""
        profile: tuple[float, ...] = getattr(self, name)
        return profile[layer] if profile and layer is not None else 1.0


@dataclass(frozen=True, kw_only=True)
class Multipliers:
    """All per-module multipliers of a run; the default changes nothing."""

    types: Mapping[Module, ModuleMultipliers] = field(default_factory=lambda: MappingProxyType({}))
    """Factors by module type; a module left out has all factors 1."""
    depth: DepthProfiles = field(default_factory=DepthProfiles)
    """Factors by layer, shared by all modules inside the stack."""
    attention_residual_mult: float = 1.0
    """On the attention branch's residual multiplier, every layer."""
    mlp_residual_mult: float = 1.0
    """On the MLP branch's residual multiplier, every layer."""

    def __post_init__(self) -> None:
        _require_positive("multipliers.attention_residual_mult", self.attention_residual_mult)
        _require_positive("multipliers.mlp_residual_mult", self.mlp_residual_mult)
        for module, factors in self.types.items():
            if MODULE_ROLES[module] in GAIN_ROLES and factors.init_std_mult != 1:
                raise ConfigError(
                    f"multipliers.types.{module}.init_std_mult is {factors.init_std_mult}, but "
                    f"{module} is a gain: it starts at 1 and has no standard deviation. Leave "
                    "init_std_mult out."
                )

    def of(self, module: Module) -> ModuleMultipliers:
        """The type factors of `module`."""
        return self.types.get(module, _NEUTRAL)


def interpolate_profile(profile: tuple[float, ...], num_layers: int) -> tuple[float, ...]:
    """Move a depth profile to `num_layers` layers; at its own depth it comes back untouched.

    Log-linear over the layer's relative position (l + 1/2)/L, clamped at the ends, geometric mean
    kept at 1 (rules, section 4).
    """
    size = len(profile)
    if size == num_layers:
        return profile
    logs = [math.log(value) for value in profile]
    moved = []
    for layer in range(num_layers):
        position = min(max((layer + 0.5) / num_layers * size - 0.5, 0.0), size - 1.0)
        left = min(int(position), size - 2) if size > 1 else 0
        right = min(left + 1, size - 1)
        moved.append(logs[left] + (position - left) * (logs[right] - logs[left]))
    mean = sum(moved) / num_layers
    return tuple(math.exp(value - mean) for value in moved)


def _require_positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ConfigError(f"{name} is {value}; expected a positive, finite factor (1 = unchanged).")


_NEUTRAL = ModuleMultipliers()
