"""The recipe: what a search found at the proxy, as one file that `plan` and `train` take.

Type multipliers x depth profiles over base hyperparameters, the base they were tuned at, the rules
that move them, and where they came from. A recipe that a search wrote carries the hash of its
contents; one written by hand has none.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron_completedp.config.run import RunConfig
from megatron_completedp.config.schema import INLINE, keys
from megatron_completedp.config.sections import RecipeOrigin
from megatron_completedp.config.tree import build, given_tree, merge, read_yaml, to_tree, to_yaml
from megatron_completedp.core.hyperparams import BaseHyperparams
from megatron_completedp.core.multipliers import LEVELS, Level, Multipliers
from megatron_completedp.core.ratios import Scale
from megatron_completedp.core.roles import Module
from megatron_completedp.core.shape import ModelShape
from megatron_completedp.core.tables import Rules
from megatron_completedp.errors import ConfigError

VERSION = 1

#: Differences that an error spells out.
SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a recipe came from. It decides nothing; all of it may be left out."""

    study: str | None = None
    """Name of the study."""
    trials: int | None = None
    """Finished trials of the study."""
    seeds: tuple[int, ...] = ()
    """Every seed that a trial of the study had."""
    loss: float | None = None
    """Mean validation loss at the base over its runs, nats per token."""
    loss_standard_error: float | None = None
    """Of that mean, over the seeds."""
    diverged: int = 0
    """Further runs of this point in the study that diverged."""
    heldout_loss: float | None = None
    """Mean loss of fresh runs at the base on text that no trial was compared on.

    None where one of them diverged.
    """
    heldout_loss_standard_error: float | None = None
    """Of that mean, over these runs."""
    heldout_seeds: tuple[int, ...] = ()
    """Seeds of these runs."""
    heldout_diverged: tuple[int, ...] = ()
    """Those of them with which the run diverged."""
    data: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """SHA-256 of the data by path prefix."""
    tokenizer: str | None = None
    """SHA-256 of the tokenizer."""
    code_version: str | None = None
    """Version of this package."""
    git_commit: str | None = None
    """Commit of the code, where it was a checkout."""
    sources: str | None = None
    """SHA-256 of the package's sources."""
    created: str | None = None
    """Date and time in UTC."""


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The part of a recipe that becomes part of a run, key by key."""

    rules: Rules = field(default_factory=Rules, metadata=INLINE)
    """Parametrization and its switches; their keys stand at the top level of the file."""
    base: Scale
    """Where it was tuned."""
    hyperparams: BaseHyperparams
    """Values at the base."""
    multipliers: Multipliers = field(default_factory=Multipliers)
    """Per-module factors, depth profiles as they are at the base."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a search found, checked within itself."""

    level: Level
    """How fine the search was."""
    modules: tuple[Module, ...]
    """What the proxy had: other models are refused."""
    tuned: Tuned = field(metadata=INLINE)
    """What a run gets."""
    provenance: Provenance = field(default_factory=Provenance)
    """Where it came from."""

    def __post_init__(self) -> None:
        multipliers = self.tuned.multipliers
        if LEVELS.index(multipliers.level) > LEVELS.index(self.level):
            raise ConfigError(
                f"level is {self.level}, but the multipliers are of level {multipliers.level}; "
                "name that level, or leave the finer factors out."
            )
        for module in (*multipliers.types, *multipliers.layers):
            if module not in self.modules:
                raise ConfigError(
                    f"the multipliers name {module}, which is not among modules: "
                    f"{', '.join(self.modules)}. Add it, or leave its factors out."
                )
        multipliers.check_depth(self.tuned.base.num_layers)

    @classmethod
    def of(cls, config: RunConfig, level: Level, provenance: Provenance | None = None) -> Recipe:
        """The recipe that the run `config` follows: its own scale is the base if it names none.

        `level` is the search's; where the run it started from had finer factors, theirs.
        """
        return cls(
            level=max(level, config.multipliers.level, key=LEVELS.index),
            modules=config.model.modules,
            tuned=Tuned(
                rules=config.rules,
                base=config.base or config.scale,
                hyperparams=config.hyperparams,
                multipliers=config.multipliers,
            ),
            provenance=provenance or Provenance(),
        )

    @property
    def sha256(self) -> str:
        """Hash of everything in the recipe that is not at its default."""
        text = json.dumps({"version": VERSION, **given_tree(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def check_model(self, model: ModelShape, path: str) -> None:
        """Raise ConfigError when `model` has other modules than those the recipe is for."""
        lacks = [module for module in self.modules if module not in model.modules]
        more = [module for module in model.modules if module not in self.modules]
        if lacks or more:
            found = [f"this model lacks {', '.join(lacks)}"] if lacks else []
            found += [f"the recipe has nothing for this model's {', '.join(more)}"] if more else []
            raise ConfigError(
                f"the recipe {path} was tuned on other modules: {', and '.join(found)}. Train the "
                "model it was tuned for (model.activation decides on the gate, "
                "model.tied_embeddings on the unembedding), or search on a proxy of this one."
            )


def load_recipe(path: str | Path) -> tuple[Recipe, RecipeOrigin]:
    """The recipe in the YAML file at `path`, and what runs that follow it record.

    Raises ConfigError for a file that cannot be read, another version, a bad value, and a hash
    that is not that of the contents. A file without a hash is taken as written by hand.
    """
    tree = read_yaml(path)
    version = tree.pop("version", None)
    if version != VERSION:
        raise ConfigError(
            f"{path} has version {version!r}; expected a recipe, with version: {VERSION}. Another "
            "version needs the release that wrote it."
        )
    written = tree.pop("hash", None)
    try:
        recipe = build(Recipe, tree)
    except ConfigError as error:
        raise ConfigError(f"recipe {path}: {error}") from error
    if written is not None and written != recipe.sha256:
        raise ConfigError(
            f"the recipe {path} was changed after it was written: its hash is {written}, that of "
            f"its contents is {recipe.sha256}. Restore it or export it again; to use the changed "
            "one as written by hand, remove the line `hash:`."
        )
    origin = RecipeOrigin(
        path=str(path), level=recipe.level, sha256=recipe.sha256, hand_written=written is None
    )
    return recipe, origin


def save_recipe(path: str | Path, recipe: Recipe) -> None:
    """Write `recipe` with its hash to `path`: the whole file or nothing.

    Writing the same recipe again does nothing, at whatever time and by whatever code. Raises
    ConfigError, and leaves the file as it is, when `path` holds anything else.
    """
    path = Path(path)
    if path.exists():
        if _undated(load_recipe(path)[0]) == _undated(recipe):
            return
        raise ConfigError(
            f"{path} holds another recipe, which runs may refer to; it is not overwritten. Choose "
            "another path, or remove the file."
        )
    text = f"version: {VERSION}\n{to_yaml(recipe)}hash: {recipe.sha256}\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_whole(path, text)
    except OSError as error:
        raise ConfigError(
            f"the recipe cannot be written to {path}: {error}. Choose a path that you may write to."
        ) from error


def _undated(recipe: Recipe) -> Recipe:
    """`recipe` without when and by which code it was written."""
    origin = recipe.provenance
    code = replace(origin, code_version=None, git_commit=None, sources=None)
    return replace(recipe, provenance=replace(code, created=None))


def _write_whole(path: Path, text: str) -> None:
    """Write under a temporary name, bring it to the disk, and rename it."""
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def apply_recipe(tree: Mapping[str, Any], recipe: Recipe, origin: RecipeOrigin) -> dict[str, Any]:
    """The tree of a run with what `recipe` brings, and with its origin under `recipe`.

    Raises ConfigError naming both values where `tree` already has one that differs.
    """
    brought = to_tree(recipe.tuned)
    given = {entry.name: tree[entry.name] for entry in keys(Tuned) if entry.name in tree}
    # Built, so that 3e-3 as text is the number that it means, and a mistake is named as ever.
    beside = _leaves(to_tree(build(Tuned, merge(brought, given))))
    ours = _leaves(brought)
    differing = [
        f"{name} is {beside[name]!r} in the run and {ours.get(name, 'left out')!r} in the recipe"
        for name in beside
        if name not in ours or beside[name] != ours[name]
    ]
    if differing:
        more = f", and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
        raise ConfigError(
            f"the recipe {origin.path} brings rules, base, hyperparams and multipliers, and the "
            f"run gives others: {'; '.join(differing[:SHOWN])}{more}. Remove them from the run, "
            "or leave the recipe out."
        )
    return {**tree, **brought, "recipe": to_tree(origin)}


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every value of nested mappings by its dotted path; a list is a value."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found.update(_leaves(value, f"{prefix}{name}."))
        else:
            found[prefix + name] = value
    return found
