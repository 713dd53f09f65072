"""The runs of `search transfer`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_completedp.config.load import identity
from megatron_completedp.config.recipe import Recipe, load_recipe
from megatron_completedp.config.run import RunConfig
from megatron_completedp.errors import ConfigError
from megatron_completedp.plan.run_plan import Plan
from megatron_completedp.search.heldout import check_seeds, check_unseen, on_heldout
from megatron_completedp.search.transfer_settings import SizeSettings, TransferSettings
from megatron_completedp.study.fit import SeedCurve
from megatron_completedp.study.points import as_point, numbers_hash
from megatron_completedp.study.sizes import Axis, moved
from megatron_completedp.study.tasks import Point


class TransferRuns:
    """Every run that the settings want: recipe x size x duration x seed."""

    def __init__(self, settings: TransferSettings, base: RunConfig, folder: Path) -> None:
        """`folder` is that of the run folders.

        Raises ConfigError for recipes of another base or model, for text or seeds that a search
        chose by and for sizes that are none, and what `Plan.of` raises: nothing is trained before
        every run is known to be possible.
        """
        self.settings = settings
        self.folder = folder
        self.base = as_point(on_heldout(base, settings.heldout))
        self._recipes = {
            name: _recipe(self.base, name, path) for name, path in settings.recipes.items()
        }
        for name, each in self._recipes.items():
            check_unseen(each.provenance, settings.heldout, settings.recipes[name])
        # The first run of every point of a search has the base's seed.
        had = [base.seed, *(s for one in self._recipes.values() for s in one.provenance.seeds)]
        check_seeds(settings.seeds, had)
        self._configs = {
            (recipe, size, duration): self._config(recipe, of, duration)
            for recipe in settings.recipes
            for size, of in settings.sizes.items()
            for duration in of.durations
        }

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What every row is a measurement of; a row's id has the rest."""
        return {
            "samples": self.base.evaluation.samples,
            "run": identity(self.base, "seed", "hyperparams", "multipliers"),
        }

    def config(self, recipe: str, size: str, duration: float) -> RunConfig:
        """The run of any seed."""
        return self._configs[recipe, size, duration]

    def _config(self, recipe: str, size: SizeSettings, duration: float) -> RunConfig:
        tuned = self._recipes[recipe].tuned
        config = replace(
            self.base,
            base=self.base.base or self.base.scale,
            hyperparams=tuned.hyperparams,
            multipliers=tuned.multipliers,
        )
        ratios: tuple[tuple[Axis, float], ...] = (
            ("width", size.width),
            ("depth", size.depth),
            ("batch", size.batch),
            ("duration", duration),
        )
        for axis, ratio in ratios:
            config = moved(config, axis, ratio)
        # Its evaluation comes after its own last step.
        return as_point(config)

    def point(self, recipe: str, size: str, duration: float, seed: int) -> Point:
        """One run; recipes that give it the same numbers share it."""
        config = self.config(recipe, size, duration)
        shape = f"width{config.model.hidden_size}_depth{config.model.num_layers}"
        length = f"batch{config.training.global_batch_size}_tokens{config.train_tokens}"
        name = f"{shape}_{length}_seed{seed}_{numbers_hash(Plan.of(config))}"
        return Point(
            id=name,
            config=replace(config, seed=seed, run_dir=str(self.folder / name)),
            labels={"recipe": recipe, "size": size, "tokens": config.train_tokens, "seed": seed},
        )

    def points(self) -> list[Point]:
        """The runs, one seed after the other and the longest first; recipes may share some."""
        keys = sorted(self._configs, key=lambda key: -_cost(self._configs[key]))
        return [
            self.point(recipe, size, duration, seed)
            for seed in self.settings.seeds
            for recipe, size, duration in keys
        ]

    def curves(self, recipe: str, size: str, rows: Sequence[Mapping[str, Any]]) -> list[SeedCurve]:
        """Loss over log2 of the tokens, one curve per seed, in the order of the seeds."""
        losses = {row["id"]: math.inf if row["diverged"] else float(row["loss"]) for row in rows}
        return [
            {
                math.log2(self.config(recipe, size, duration).train_tokens): losses[
                    self.point(recipe, size, duration, seed).id
                ]
                for duration in self.settings.sizes[size].durations
            }
            for seed in self.settings.seeds
        ]


def _recipe(base: RunConfig, name: str, path: str) -> Recipe:
    """The recipe at `path`, or the base run's own; held to be one of `base`."""
    if not path:
        return Recipe.of(base, "global")
    recipe, _ = load_recipe(path)
    recipe.check_model(base.model, path)
    if recipe.tuned.base != (base.base or base.scale) or recipe.tuned.rules != base.rules:
        raise ConfigError(
            f"recipes.{name}: {path} was tuned at another base, or by other rules, than the run: "
            f"{recipe.tuned.base} with {recipe.tuned.rules}. All are to be carried in the same "
            "way; give the run that it was searched at."
        )
    return recipe


def _cost(config: RunConfig) -> float:
    return config.model.parameters * config.train_tokens
