"""What a search may change: natural logs of factors on the base run, and their bounds.

A point is a mapping from names to logs; 0 is the base run's value. A name is the path of what it
multiplies: `hyperparams.lr`, `types.q.lr_mult`, `depth.lr_mult.0`, `layers.q.lr_mult.1`,
`attention_residual_mult`, and `hyperparams.one_minus_beta1` for a beta.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from megatron_completedp.config.run import RunConfig
from megatron_completedp.core.hyperparams import BaseHyperparams
from megatron_completedp.core.multipliers import (
    LayerProfiles,
    Level,
    ModuleMultipliers,
    Multipliers,
)
from megatron_completedp.core.roles import GAIN_ROLES, MODULE_ROLES, OUTSIDE_STACK, Module
from megatron_completedp.errors import ConfigError

if TYPE_CHECKING:
    from optuna.distributions import FloatDistribution

P = TypeVar("P", bound=LayerProfiles)
S = TypeVar("S", ModuleMultipliers, Multipliers, BaseHyperparams)

#: The kinds of dimensions: (bound, start radius). The default bounds are -bound and +bound.
#: A tenth to ten times for what sets a step's size; eps acts over more decades than the others;
#: weights and branches a quarter to four times. Radii are those of the rules, section 5.
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


@dataclass(frozen=True)
class Space:
    """The dimensions of one level for one model."""

    level: Level
    dimensions: tuple[Dimension, ...]

    @classmethod
    def of(
        cls, config: RunConfig, level: Level, bounds: Mapping[str, tuple[float, ...]] | None = None
    ) -> Space:
        """What can be searched at `level` around the run `config`: only what its model has.

        `global` multiplies the base's hyperparameters, `types` one factor for each module,
        `types_x_depth` also one for each base layer, shared by its modules, `full` one for each
        module and base layer instead; each has the two residual multipliers.

        `bounds` replaces the bounds of a dimension, by name, or of a kind (a key of KINDS), as
        (low, high) in natural logs; where a beta has less room than its kind, it keeps its own.
        Raises ConfigError for a name that is neither, and for bounds that are inverted, leave out 0
        or let a beta leave (0, 1).
        """
        bounds = bounds or {}
        names = list(_names(config, level))
        _check_bounds(bounds, names)
        return cls(level, tuple(_dimension(config, level, name, bounds) for name in names))

    @property
    def names(self) -> tuple[str, ...]:
        """The dimensions' names, in order."""
        return tuple(dimension.name for dimension in self.dimensions)

    @property
    def identity(self) -> dict[str, Any]:
        """What makes two searches' spaces the same, as plain data: level, names and bounds."""
        bounds = {dimension.name: [dimension.low, dimension.high] for dimension in self.dimensions}
        return {"level": self.level, "bounds": bounds}

    def distributions(self) -> dict[str, FloatDistribution]:
        """For Optuna: a float between its bounds by name."""
        from optuna.distributions import FloatDistribution

        return {item.name: FloatDistribution(item.low, item.high) for item in self.dimensions}

    def apply(self, config: RunConfig, point: Mapping[str, float]) -> RunConfig:
        """The run `config`, from which the space was made, at `point`.

        A dimension that `point` leaves out stays at 0, and at 0 every number stays bit for bit as
        it was. Profiles are taken relative to their mean over the layers, so that their geometric
        mean stays 1. The result names no recipe, even where `config` did: its numbers are others.
        Raises ConfigError for a name that is no dimension and a value out of bounds.
        """
        self._check(point)
        tree = _tree(point)
        multipliers = config.multipliers
        types, layers = dict(multipliers.types), dict(multipliers.layers)
        for name, logs in tree.get("types", {}).items():
            types[Module(name)] = _scaled(multipliers.of(Module(name)), logs)
        for name, logs in tree.get("layers", {}).items():
            layers[Module(name)] = _shaped(
                multipliers.layers.get(Module(name), LayerProfiles()), logs, _base_layers(config)
            )
        residuals = {name: tree[name] for name in RESIDUALS if name in tree}
        return replace(
            config,
            recipe=None,
            hyperparams=_scaled_base(config, tree.get("hyperparams", {})),
            multipliers=replace(
                _scaled(multipliers, residuals),
                types=MappingProxyType(types),
                depth=_shaped(multipliers.depth, tree.get("depth", {}), _base_layers(config)),
                layers=MappingProxyType(layers),
            ),
        )

    def _check(self, point: Mapping[str, float]) -> None:
        known = {dimension.name: dimension for dimension in self.dimensions}
        for name, value in point.items():
            if name not in known:
                near = difflib.get_close_matches(name, known) or list(known)[:3]
                raise ConfigError(
                    f"{name} is no dimension of this space at level {self.level}; did you mean "
                    f"{' or '.join(near)}?"
                )
            low, high = known[name].low, known[name].high
            if not low <= value <= high:
                raise ConfigError(f"{name} is {value}; expected a log in [{low:.4g}, {high:.4g}].")


def _names(config: RunConfig, level: Level) -> Iterator[str]:
    modules = config.model.modules
    if level == "global":
        yield from (f"hyperparams.{name}" for name in _base_names(config))
    else:
        for module in modules:
            yield from (f"types.{module}.{name}" for name in _searched(config, module))
    layers = range(_base_layers(config))
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


def _base_layers(config: RunConfig) -> int:
    """Layers of a depth profile: the base's."""
    return config.base.num_layers if config.base else config.model.num_layers


def _kind(name: str) -> str:
    """The key of KINDS for the dimension `name`."""
    leaf = [part for part in name.split(".") if not part.isdigit()][-1].removesuffix("_mult")
    return next(kind for kind in KINDS if leaf.endswith(kind))


def _dimension(
    config: RunConfig, level: Level, name: str, bounds: Mapping[str, tuple[float, ...]]
) -> Dimension:
    kind = _kind(name)
    bound, radius = KINDS[kind]
    least, most = _limits(config, level, name)
    low, high = bounds.get(kind, (-bound, bound))
    if name in bounds:
        low, high = bounds[name]
        if low < least or high > most:
            raise ConfigError(
                f"bounds.{name} is [{low}, {high}]; the base run's beta stays within (0, 1) for "
                f"sure in [{least:.4g}, {most:.4g}] only. Narrow it."
            )
    return Dimension(name, max(low, least), min(high, most), radius)


def _limits(config: RunConfig, level: Level, name: str) -> tuple[float, float]:
    """The logs between which `name` leaves every beta in (0, 1), whatever the other dimensions do.

    Where a type and a layer multiply each other, the type gets half of the room above. A layer gets
    a quarter, both ways: relative to the layers' mean it comes out at less than twice that.
    """
    kind = _kind(name)
    if not kind.startswith("one_minus_beta"):
        return -math.inf, math.inf
    beta, mult = kind.removeprefix("one_minus_"), f"{kind}_mult"
    layers = range(_base_layers(config))
    multipliers = config.multipliers
    now = (1 - getattr(config.hyperparams, beta)) * max(
        getattr(multipliers.of(module), mult)
        * multipliers.layer_factor(module, mult, None if module in OUTSIDE_STACK else layer)
        for module in config.model.modules
        for layer in layers
    )
    if now >= 1:
        raise ConfigError(
            f"the base run's multipliers bring {beta} to {1 - now:.4g}; expected a value in (0, 1)."
        )
    room = math.log((1 - LEAST_BETA * (1 - now)) / now)
    if name.startswith(("depth.", "layers.")):
        return -room / 4, room / 4
    return -math.inf, room / 2 if level in ("types_x_depth", "full") else room


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


def _tree(point: Mapping[str, float]) -> dict[str, Any]:
    """`point` as nested mappings, one level for each part of a name."""
    tree: dict[str, Any] = {}
    for name, value in point.items():
        *parents, leaf = name.split(".")
        branch = tree
        for part in parents:
            branch = branch.setdefault(part, {})
        branch[leaf] = value
    return tree


def _scaled(values: S, logs: Mapping[str, float]) -> S:
    """`values` with those that `logs` names multiplied."""
    moved = {name: getattr(values, name) * math.exp(log) for name, log in logs.items()}
    return replace(values, **moved)


def _scaled_base(config: RunConfig, logs: Mapping[str, float]) -> BaseHyperparams:
    base = config.hyperparams
    betas = {
        name.removeprefix("one_minus_"): log
        for name, log in logs.items()
        if name.startswith("one_minus_") and log != 0  # 1 - (1 - beta) would move the last bit
    }
    direct = {name: log for name, log in logs.items() if not name.startswith("one_minus_")}
    scaled = replace(
        _scaled(base, direct),
        **{name: 1 - (1 - getattr(base, name)) * math.exp(log) for name, log in betas.items()},
    )
    if config.model.tied_embeddings:
        return replace(scaled, unembedding_init_std=scaled.embedding_init_std)
    return scaled


def _shaped(profiles: P, logs: Mapping[str, Mapping[str, float]], num_layers: int) -> P:
    """`profiles` with those that `logs` names multiplied, layer by layer, at a mean log of 0."""
    moved = {}
    for name, by_layer in logs.items():
        values = [by_layer.get(str(layer), 0.0) for layer in range(num_layers)]
        mean = math.fsum(values) / num_layers
        if any(value != mean for value in values):
            moved[name] = tuple(
                profiles.factor(name, layer) * math.exp(value - mean)
                for layer, value in enumerate(values)
            )
    return replace(profiles, **moved)
