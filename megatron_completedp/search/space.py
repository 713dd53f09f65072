"""What a search may change: natural logs of factors on the base run, and their bounds.

A point is a mapping from names to logs; 0 is the base run's value. A name is the path of what it
multiplies: `hyperparams.lr`, `types.q.lr_mult`, `depth.lr_mult.0`, `layers.q.lr_mult.1`,
`attention_residual_mult`, and `hyperparams.one_minus_beta1` for a beta.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
from megatron_completedp.core.render import text_table
from megatron_completedp.core.roles import Module
from megatron_completedp.errors import ConfigError
from megatron_completedp.search.dimensions import (
    RESIDUALS,
    Dimension,
    base_layers,
    dimensions,
    largest,
    one_minus,
)

if TYPE_CHECKING:
    from optuna.distributions import FloatDistribution

P = TypeVar("P", bound=LayerProfiles)
S = TypeVar("S", ModuleMultipliers, Multipliers, BaseHyperparams)

#: Nats from a bound that count as on it: what trials.jsonl rounds away is less.
ON_BOUND = 1e-5


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
        return cls(level, dimensions(config, level, bounds or {}))

    @property
    def names(self) -> tuple[str, ...]:
        """The dimensions' names, in order."""
        return tuple(dimension.name for dimension in self.dimensions)

    @property
    def identity(self) -> dict[str, Any]:
        """What makes two searches' spaces the same, as plain data: level, names and bounds."""
        bounds = {dimension.name: [dimension.low, dimension.high] for dimension in self.dimensions}
        return {"level": self.level, "bounds": bounds}

    def trust_region(self) -> dict[str, Any]:
        """What `samplers.make_sampler` is told of the dimensions: start radii and kinds by name."""
        return {
            "radius": {item.name: item.radius for item in self.dimensions},
            "kinds": {item.name: item.kind for item in self.dimensions},
        }

    def distributions(self) -> dict[str, FloatDistribution]:
        """For Optuna: a float between its bounds by name."""
        from optuna.distributions import FloatDistribution

        return {item.name: FloatDistribution(item.low, item.high) for item in self.dimensions}

    def on_bounds(self, point: Mapping[str, float]) -> list[str]:
        """The dimensions that `point` has moved to one of their bounds."""
        return [
            item.name
            for item in self.dimensions
            if min(point[item.name] - item.low, item.high - point[item.name]) < ON_BOUND
        ]

    def table(self) -> str:
        """Every dimension with its bounds and the trust region's first reach, as factors."""
        rows = [
            [item.name, *(f"{math.exp(x):.3g}" for x in (item.low, item.high, item.radius))]
            for item in self.dimensions
        ]
        return text_table(["factor on", "lowest", "highest", "first reach"], rows)

    def apply(self, config: RunConfig, point: Mapping[str, float]) -> RunConfig:
        """The run `config`, from which the space was made, at `point`.

        A dimension that `point` leaves out stays at 0, and at 0 every number stays bit for bit as
        it was. Profiles are taken relative to their mean over the layers, so that their geometric
        mean stays 1. Where types and layers together would bring a beta out of its range, the type
        yields. The result names no recipe, even where `config` did: its numbers are others.
        Raises ConfigError for a name that is no dimension and a value out of bounds.
        """
        self.check(point)
        tree = _tree(point)
        multipliers = config.multipliers
        types, layers = dict(multipliers.types), dict(multipliers.layers)
        for name, logs in tree.get("types", {}).items():
            types[Module(name)] = _scaled(multipliers.of(Module(name)), logs)
        for name, logs in tree.get("layers", {}).items():
            layers[Module(name)] = _shaped(
                multipliers.layers.get(Module(name), LayerProfiles()), logs, base_layers(config)
            )
        residuals = {name: tree[name] for name in RESIDUALS if name in tree}
        moved = replace(
            _scaled(multipliers, residuals),
            types=MappingProxyType(types),
            depth=_shaped(multipliers.depth, tree.get("depth", {}), base_layers(config)),
            layers=MappingProxyType(layers),
        )
        return replace(
            config,
            recipe=None,
            hyperparams=_scaled_base(config, tree.get("hyperparams", {})),
            multipliers=_in_range(config, moved) if tree.keys() & {"depth", "layers"} else moved,
        )

    def check(self, point: Mapping[str, float]) -> None:
        """Raise ConfigError for a name that is no dimension and a value out of its bounds."""
        known = {dimension.name: dimension for dimension in self.dimensions}
        for name, value in point.items():
            if name not in known:
                near = difflib.get_close_matches(name, known) or list(known)[:3]
                raise ConfigError(
                    f"{name} is no dimension of this space at level {self.level}; did you mean "
                    f"{' or '.join(near)}?"
                )
            low, high = known[name].low, known[name].high
            if not (isinstance(value, int | float) and low <= value <= high):
                raise ConfigError(f"{name} is {value}; expected a log in [{low:.4g}, {high:.4g}].")


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


def _in_range(config: RunConfig, moved: Multipliers) -> Multipliers:
    """`moved` with less 1 - beta for each module that has more than `largest` in some layer."""
    types = dict(moved.types)
    for kind in ("one_minus_beta1", "one_minus_beta2"):
        bound = largest(config, kind)
        for module in config.model.modules:
            share = bound / one_minus(config, moved, module, kind)
            if share < 1 - 1e-9:  # beyond rounding
                types[module] = _scaled(
                    types.get(module, ModuleMultipliers()), {f"{kind}_mult": math.log(share)}
                )
    return replace(moved, types=MappingProxyType(types))


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
