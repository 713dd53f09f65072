"""A run from its YAML, with the recipe it names, and what makes two runs the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_completedp.config.recipe import apply_recipe, load_recipe
from megatron_completedp.config.run import RunConfig
from megatron_completedp.config.tree import build, given_tree, read_yaml, to_tree, to_yaml

__all__ = [
    "NOT_THE_RUN",
    "build",
    "build_run",
    "config_hash",
    "identity",
    "load_config",
    "read_run",
    "read_yaml",
    "to_tree",
    "to_yaml",
]

#: Where and how often, not what: two runs that differ only here make the same updates. (Those that
#: differ in divergence do until a step goes wrong; a stopped run may then go on by another policy.)
NOT_THE_RUN = (
    "run_dir",
    "parallel",
    "training.micro_batch_size",
    "training.device",
    "training.timeout_s",
    "divergence",
    "evaluation",
    "data.cache_dir",
    "data.verify_hashes",
    "checkpoint",
    "logging",
    "recipe",
)


def load_config(path: str | Path) -> RunConfig:
    """The run in the YAML file at `path`. Raises ConfigError naming the key at fault."""
    return build_run(read_run(path))


def read_run(path: str | Path) -> dict[str, Any]:
    """The tree of a run's YAML; a path under `recipe` is relative to that YAML's folder.

    So the two can move together. As a flag the path is relative to the working directory.
    """
    tree = read_yaml(path)
    if isinstance(tree.get("recipe"), str):
        tree["recipe"] = str(Path(path).parent / tree["recipe"])
    return tree


def build_run(tree: Mapping[str, Any]) -> RunConfig:
    """The run of `tree`; where `recipe` is a path, the recipe's numbers are filled in.

    A `recipe` that is a section says where the numbers came from that the file already holds: a
    run's folder does not depend on the recipe's file. Raises ConfigError for a bad value, a recipe
    that cannot be used, and a number given beside a recipe that says otherwise.
    """
    path = tree.get("recipe")
    if not isinstance(path, str):
        return build(RunConfig, tree)
    recipe, origin = load_recipe(path)
    config = build(RunConfig, apply_recipe(tree, recipe, origin))
    recipe.check_model(config.model, path)
    return config


def identity(config: RunConfig, *leave_out: str) -> dict[str, Any]:
    """What decides the sequence of updates, as plain values; without the paths in `leave_out` too.

    Left out: NOT_THE_RUN, and every value at its default.
    """
    tree = given_tree(config)
    for path in (*NOT_THE_RUN, *leave_out):
        *sections, name = path.split(".")
        parent = tree
        for section in sections:
            parent = parent.get(section, {})
        parent.pop(name, None)
    return {name: value for name, value in tree.items() if value != {}}


def config_hash(config: RunConfig) -> str:
    """sha256 over the identity of the run."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()
