"""The runs of `search transfer`, and what their losses say in tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_completedp.config.load import identity
from megatron_completedp.config.recipe import Recipe, load_recipe
from megatron_completedp.config.run import RunConfig
from megatron_completedp.errors import ConfigError
from megatron_completedp.plan.run_plan import Plan
from megatron_completedp.search.heldout import check_seeds, check_unseen, on_heldout
from megatron_completedp.search.transfer_settings import SizeSettings, TransferSettings
from megatron_completedp.study.fit import Interval, mean_curve, mean_interval
from megatron_completedp.study.points import as_point, numbers_hash
from megatron_completedp.study.sizes import Axis, moved
from megatron_completedp.study.tasks import Point

#: Validation loss of one seed by log2 of the trained tokens; infinite where the run diverged.
Curve = Mapping[float, float]


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

    def missing(self, rows: Sequence[Mapping[str, Any]]) -> list[Point]:
        """The runs without a row, one seed after the other and the longest first."""
        done = {row["id"] for row in rows}
        wanted: dict[str, Point] = {}
        for seed in self.settings.seeds:
            keys = sorted(self._configs, key=lambda key: -_cost(self._configs[key]))
            for recipe, size, duration in keys:
                point = self.point(recipe, size, duration, seed)
                wanted.setdefault(point.id, point)
        return [point for name, point in wanted.items() if name not in done]

    def curves(self, recipe: str, size: str, rows: Sequence[Mapping[str, Any]]) -> list[Curve]:
        """Loss over tokens, one curve per seed, in the order of the seeds."""
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


@dataclass(frozen=True)
class Saving:
    """How many tokens a recipe saves at the loss that the baseline reaches."""

    level: float
    """Loss of the baseline at its reference, nats per token; not finite where it diverged."""
    reference: float
    """log2 of the tokens that the baseline needs for it."""
    needed: float
    """log2 of the tokens that the recipe needs; NaN outside of what was trained."""
    interval: Interval
    """Of the ratio, Student's over seeds; NaN where one seed has no ratio of its own."""

    @property
    def ratio(self) -> float:
        """Tokens of the baseline over those of the recipe; above 1 saves."""
        return float(2.0 ** (self.reference - self.needed))

    @property
    def bracket(self) -> str:
        """The interval as text."""
        low, high = self.interval.low, self.interval.high
        return "not known" if math.isnan(low) else f"[{low:.2f}, {high:.2f}]"


def saving(baseline: Sequence[Curve], recipe: Sequence[Curve], reference: float) -> Saving:
    """The tokens saved at the loss of `baseline` after 2^reference tokens.

    The ratio is that of the mean curves. Curves are per seed, in the same order, and a seed's pair
    shares its data and initial weights: the interval is as wide, in logs, as Student's of the mean
    of the ratios that the seeds have one by one.
    """
    level = mean_curve(baseline)[reference]
    needed = log_tokens_at(mean_curve(recipe), level)
    by_seed = [
        reference - log_tokens_at(ours, theirs[reference])
        for theirs, ours in zip(baseline, recipe, strict=True)
    ]
    own = mean_interval(by_seed)
    shift = reference - needed - fmean(by_seed)
    return Saving(
        level, reference, needed, Interval(2.0 ** (own.low + shift), 2.0 ** (own.high + shift))
    )


def log_tokens_at(curve: Curve, level: float) -> float:
    """log2 of the tokens after which `curve` first reaches `level`, linear between its points.

    NaN where it starts below or never gets there: nothing is extrapolated.
    """
    points = sorted(curve.items())
    if points[0][1] < level:
        return math.nan
    for (x0, y0), (x1, y1) in pairwise(points):
        if y1 <= level <= y0 and math.isfinite(y0):
            return x0 if y0 == y1 else x0 + (y0 - level) / (y0 - y1) * (x1 - x0)
    return math.nan


def outside(curve: Curve, level: float) -> str:
    """Why `log_tokens_at` has no answer."""
    if not (math.isfinite(level) and all(math.isfinite(loss) for loss in curve.values())):
        return "a run diverged"
    if min(curve.items())[1] < level:
        return "already its shortest run is better than the baseline's reference; add shorter ones"
    return "even its longest run is worse than the baseline's reference; add longer ones"
