"""Per-module multipliers: type x depth, the part of a hyperparameter that the search finds.

log zeta[module, layer] = log type[module] + log depth[layer] + ..., where the rest comes from
`core.tables`. A value of 1 everywhere is "global hyperparameters only".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Literal, Self

from megatron_completedp.core.roles import GAIN_ROLES, MODULE_ROLES, OUTSIDE_STACK, Module
from megatron_completedp.errors import ConfigError

#: How fine hyperparameters are, from one value for all modules to one per module and layer. Each
#: holds the ones before it; residual multipliers belong to all of them.
Level = Literal["global", "types", "types_x_depth", "full"]
LEVELS: tuple[Level, ...] = ("global", "types", "types_x_depth", "full")

#: How far a profile's geometric mean may be from 1, relative: what writing it with four digits
#: leaves. At its own depth a profile stands as written.
MEAN_TOLERANCE = 1e-3


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
class LayerProfiles:
    """One factor per base layer for each hyperparameter; empty means 1 at every layer.

    A profile says how layers differ, not how large a value is: its geometric mean is 1, and what
    all layers share belongs to the type. At another depth it is read at (l + 1/2)/L by linear
    interpolation in log space, clamped at the ends, and rescaled to a geometric mean of 1.
    """

    lr_mult: tuple[float, ...] = ()
    """On the learning rate."""
    weight_decay_mult: tuple[float, ...] = ()
    """On the weight decay."""
    one_minus_beta1_mult: tuple[float, ...] = ()
    """On 1 - beta1."""
    one_minus_beta2_mult: tuple[float, ...] = ()
    """On 1 - beta2."""
    eps_mult: tuple[float, ...] = ()
    """On Adam's eps."""
    init_std_mult: tuple[float, ...] = ()
    """On the standard deviation of the initial weights."""

    def __post_init__(self) -> None:
        for item in fields(self):
            profile = getattr(self, item.name)
            for value in profile:
                _require_positive(f"multipliers: the layer profile {item.name}", value)
            _require_centred(item.name, profile)

    def check_depth(self, num_layers: int, where: str) -> None:
        """Raise ConfigError unless every profile has one factor for each base layer, or none.

        A profile of another length would be taken for one that was tuned at that depth. `where` is
        the section's path in a config.
        """
        for item in fields(self):
            profile = getattr(self, item.name)
            if profile and len(profile) != num_layers:
                raise ConfigError(
                    f"{where}.{item.name} has {len(profile)} factors; expected one for "
                    f"each of the base's {num_layers} layers. Give the profile as it was tuned at "
                    "the base (it moves to this model's depth by itself), or leave it empty."
                )

    def to_depth(self, num_layers: int) -> Self:
        """The same profiles at `num_layers` layers."""
        return type(self)(
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
class DepthProfiles(LayerProfiles):
    """The profiles that all modules of a layer share, and those of its residual branches."""

    attention_residual_mult: tuple[float, ...] = ()
    """On the attention branch's residual multiplier."""
    mlp_residual_mult: tuple[float, ...] = ()
    """On the MLP branch's residual multiplier."""


@dataclass(frozen=True, kw_only=True)
class Multipliers:
    """All per-module multipliers of a run; the default changes nothing.

    The factor of a module in a layer is types x depth x layers.
    """

    types: Mapping[Module, ModuleMultipliers] = field(default_factory=lambda: MappingProxyType({}))
    """Factors by module type; a module left out has all factors 1."""
    depth: DepthProfiles = field(default_factory=DepthProfiles)
    """Factors by layer, shared by all modules inside the stack."""
    layers: Mapping[Module, LayerProfiles] = field(default_factory=lambda: MappingProxyType({}))
    """Factors by module and layer, beside the shared ones; for modules inside the stack."""
    attention_residual_mult: float = 1.0
    """On the attention branch's residual multiplier, every layer."""
    mlp_residual_mult: float = 1.0
    """On the MLP branch's residual multiplier, every layer."""

    def __post_init__(self) -> None:
        _require_positive("multipliers.attention_residual_mult", self.attention_residual_mult)
        _require_positive("multipliers.mlp_residual_mult", self.mlp_residual_mult)
        for module, factors in self.types.items():
            if MODULE_ROLES[module] in GAIN_ROLES and factors.init_std_mult != 1:
                raise _gain_has_no_init(f"multipliers.types.{module}", factors.init_std_mult)
        for module, profiles in self.layers.items():
            if module in OUTSIDE_STACK:
                raise ConfigError(
                    f"multipliers.layers names {module}, which exists once, outside the layers. "
                    f"Give its factors under multipliers.types.{module}."
                )
            if MODULE_ROLES[module] in GAIN_ROLES and profiles.init_std_mult:
                raise _gain_has_no_init(f"multipliers.layers.{module}", profiles.init_std_mult)

    @property
    def level(self) -> Level:
        """The least level that holds these factors (where 1 is written out, it counts)."""
        if self.layers:
            return "full"
        if self.depth != DepthProfiles():
            return "types_x_depth"
        return "types" if self.types else "global"

    def of(self, module: Module) -> ModuleMultipliers:
        """The type factors of `module`."""
        return self.types.get(module, _NEUTRAL)

    def check_depth(self, num_layers: int) -> None:
        """Raise ConfigError unless every profile has one factor for each base layer, or none."""
        self.depth.check_depth(num_layers, "multipliers.depth")
        for module, profiles in self.layers.items():
            profiles.check_depth(num_layers, f"multipliers.layers.{module}")

    def to_depth(self, num_layers: int) -> Multipliers:
        """The same multipliers for a model of `num_layers` layers."""
        return replace(
            self,
            depth=self.depth.to_depth(num_layers),
            layers=MappingProxyType(
                {module: own.to_depth(num_layers) for module, own in self.layers.items()}
            ),
        )

    def layer_factor(self, module: Module, name: str, layer: int | None) -> float:
        """The shared factor on hyperparameter `name` at `layer` times the module's own."""
        own = self.layers.get(module)
        shared = self.depth.factor(name, layer)
        return shared if own is None else shared * own.factor(name, layer)


def interpolate_profile(profile: tuple[float, ...], num_layers: int) -> tuple[float, ...]:
    """Move a depth profile to `num_layers` layers; at its own depth it comes back untouched.

    Log-linear over the layer's relative position (l + 1/2)/L, clamped at the ends, geometric mean
    kept at 1.
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


def _require_centred(name: str, profile: tuple[float, ...]) -> None:
    """A mean other than 1 would act at the base and be gone at every other depth."""
    if not profile:
        return
    mean = math.exp(math.fsum(map(math.log, profile)) / len(profile))
    if abs(mean - 1) > MEAN_TOLERANCE:
        centred = ", ".join(f"{value / mean:.5g}" for value in profile)
        raise ConfigError(
            f"multipliers: the layer profile {name} = {list(profile)} has a geometric mean of "
            f"{mean:.5g}; expected 1. Write [{centred}] and multiply what all layers share by "
            f"{mean:.5g} (the {name} of the types, or the base value)."
        )


def _gain_has_no_init(where: str, value: object) -> ConfigError:
    return ConfigError(
        f"{where}.init_std_mult is {value}, but this module is a gain: it starts at 1 and has no "
        "standard deviation. Leave init_std_mult out."
    )


def _require_positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ConfigError(f"{name} is {value}; expected a positive, finite factor (1 = unchanged).")


_NEUTRAL = ModuleMultipliers()
