"""The numbers that a search may change: their names, and the bounds of each."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

from megatron_completedp.config.run import RunConfig
from megatron_completedp.core.hyperparams import BaseHyperparams
from megatron_completedp.core.multipliers import Level, ModuleMultipliers, Multipliers
from megatron_completedp.core.roles import GAIN_ROLES, MODULE_ROLES, OUTSIDE_STACK, Module
from megatron_completedp.errors import ConfigError

#: The kinds of dimensions: (bound, start radius). The default bounds are -bound and +bound.
#: A tenth to ten times for what sets a step's size; eps acts over more decades than the others;
#: weights and branches a quarter to four times. Radii: half a nat, a quarter for these.
KINDS: dict[str, tuple[float, float]] = {
    "lr": (math.log(10), 0.5),
    "weight_decay": (math.log(10), 0.5),
    "one_minus_beta1": (math.log(10), 0.5),
    "one_minus_beta2": (math.log(10), 0.5),
    "eps": (math.log(100), 0.5),
    "init_std": (math.log(4), 0.25),
    "residual": (math.log(4), 0.25),
}

#: No point brings a beta below this part of the base run's: 1 - beta is bounded from above.
LEAST_BETA = 0.1

RESIDUALS = ("attention_residual_mult", "mlp_residual_mult")


@dataclass(frozen=True)
class Dimension:
    """One number of a search, as the natural log of a factor; 0 is the base run's value."""

    name: str
    """Path of what it multiplies."""
    low: float
    high: float
    radius: float
    """How far from the incumbent a trust region reaches at the start."""
    kind: str
    """What it multiplies, and of what: `types.lr`, `depth.lr`, `hyperparams.init_std`, ..."""


def dimensions(
    config: RunConfig, level: Level, bounds: Mapping[str, tuple[float, ...]]
) -> tuple[Dimension, ...]:
    """What can be searched at `level` around `config`, in order; see `Space.of`."""
    names = list(_names(config, level))
    _check_bounds(bounds, names)
    return tuple(_dimension(config, name, bounds) for name in names)


def _names(config: RunConfig, level: Level) -> Iterator[str]:
    modules = config.model.modules
    if level == "global":
        yield from (f"hyperparams.{name}" for name in _base_names(config))
    else:
        for module in modules:
            yield from (f"types.{module}.{name}" for name in _searched(config, module))
    layers = range(base_layers(config))
    inside = [module for module in modules if module not in OUTSIDE_STACK]
    # One layer has no other to differ from.
    if len(layers) > 1 and level == "types_x_depth":
        for item in fields(ModuleMultipliers):
            if any(item.name in _searched(config, module) for module in inside):
                yield from (f"depth.{item.name}.{layer}" for layer in layers)
    if len(layers) > 1 and level == "full":
        for module in inside:
            for name in _searched(config, module):
                yield from (f"layers.{module}.{name}.{layer}" for layer in layers)
    if len(layers) > 1 and level in ("types_x_depth", "full"):
        yield from (f"depth.{name}.{layer}" for name in RESIDUALS for layer in layers)
    yield from RESIDUALS


def _base_names(config: RunConfig) -> Iterator[str]:
    """What `global` multiplies: the base's numbers that act."""
    for item in fields(BaseHyperparams):
        if item.name in ("beta1", "beta2"):
            yield f"one_minus_{item.name}"
        # One weight has one std: the embedding's dimension moves both.
        elif item.name == "unembedding_init_std" and config.model.tied_embeddings:
            continue
        elif getattr(config.hyperparams, item.name) > 0:  # no factor moves a decay of 0
            yield item.name


def _searched(config: RunConfig, module: Module) -> list[str]:
    """The multipliers that act on `module`."""
    gain = MODULE_ROLES[module] in GAIN_ROLES
    base = config.hyperparams
    absent = set()
    if gain:
        absent.add("init_std_mult")  # it starts at 1
    if not (base.gain_weight_decay if gain else base.weight_decay):
        absent.add("weight_decay_mult")  # no factor moves a decay of 0
    return [item.name for item in fields(ModuleMultipliers) if item.name not in absent]


def base_layers(config: RunConfig) -> int:
    """Layers of a depth profile: the base's."""
    return config.base.num_layers if config.base else config.model.num_layers


def _kind(name: str) -> str:
    """The key of KINDS for the dimension `name`."""
    leaf = [part for part in name.split(".") if not part.isdigit()][-1].removesuffix("_mult")
    return next(kind for kind in KINDS if leaf.endswith(kind))


def _dimension(config: RunConfig, name: str, bounds: Mapping[str, tuple[float, ...]]) -> Dimension:
    kind = _kind(name)
    bound, radius = KINDS[kind]
    most = _most(config, name)
    low, high = bounds.get(kind, (-bound, bound))
    if name in bounds:
        low, high = bounds[name]
        if high > most:
            raise ConfigError(
                f"bounds.{name} is [{low}, {high}]; the base run's beta stays within (0, 1) for "
                f"sure up to {most:.4g} only. Narrow it."
            )
    level = name.partition(".")[0] if "." in name else "residual"
    return Dimension(name, low, min(high, most), radius, f"{level}.{kind}")


def _most(config: RunConfig, name: str) -> float:
    """The log up to which `name` leaves every beta in (0, 1).

    Layers have no such bound of their own: `Space.apply` takes what is too much off their type, so
    that each level has every point of the one before.
    """
    kind = _kind(name)
    if not kind.startswith("one_minus_beta") or name.startswith(("depth.", "layers.")):
        return math.inf
    now = max(one_minus(config, config.multipliers, of, kind) for of in config.model.modules)
    return math.log(largest(config, kind) / now)


def largest(config: RunConfig, kind: str) -> float:
    """The largest 1 - beta that a point may have, around `config`; `kind` is the key of KINDS."""
    now = max(one_minus(config, config.multipliers, of, kind) for of in config.model.modules)
    if now >= 1:
        beta = kind.removeprefix("one_minus_")
        raise ConfigError(
            f"the base run's multipliers bring {beta} to {1 - now:.4g}; expected a value in (0, 1)."
        )
    return 1 - LEAST_BETA * (1 - now)


def one_minus(config: RunConfig, multipliers: Multipliers, module: Module, kind: str) -> float:
    """The largest 1 - beta of `module` over the base's layers, with `multipliers`."""
    mult = f"{kind}_mult"
    layers = [None] if module in OUTSIDE_STACK else range(base_layers(config))
    return float(
        (1 - getattr(config.hyperparams, kind.removeprefix("one_minus_")))
        * getattr(multipliers.of(module), mult)
        * max(multipliers.layer_factor(module, mult, layer) for layer in layers)
    )


def _check_bounds(bounds: Mapping[str, tuple[float, ...]], names: list[str]) -> None:
    for name, pair in bounds.items():
        if name not in names and name not in KINDS:
            near = difflib.get_close_matches(name, [*names, *KINDS]) or list(KINDS)
            raise ConfigError(
                f"bounds.{name} is no dimension of this model and level, and no kind; did you mean "
                f"{' or '.join(near)}?"
            )
        if len(pair) != 2 or not -math.inf < pair[0] < pair[1] < math.inf:
            raise ConfigError(
                f"bounds.{name} is {list(pair)}; expected two finite logs, the lower one first."
            )
        if not pair[0] <= 0 <= pair[1]:
            raise ConfigError(
                f"bounds.{name} is {list(pair)}, which leaves out 0: the base run's value, where "
                "the search starts. Widen it, or change the base run."
            )
