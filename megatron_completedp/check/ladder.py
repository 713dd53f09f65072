"""The runs of a transfer study: one axis grows, one hyperparameter is swept, all else is pinned."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_completedp.check.transfer_settings import TransferSettings
from megatron_completedp.config.load import identity
from megatron_completedp.config.run import RunConfig
from megatron_completedp.core.tables import Parametrization
from megatron_completedp.errors import ConfigError
from megatron_completedp.plan.run_plan import Plan
from megatron_completedp.study.fit import mean_curve
from megatron_completedp.study.points import as_point, numbers_hash
from megatron_completedp.study.sizes import Axis, moved
from megatron_completedp.study.tasks import Point

Row = Mapping[str, Any]

#: Nats above the lowest loss from which a neighbour is beyond what a parabola can say. No setting:
#: reading kept rows by another window must not want other runs.
CLIFF = 0.1

#: A sweep is not refined below this distance from a far higher loss, in octaves.
FINEST_STEP = 0.125


class Ladder:
    """Every run that a study wants, derived from its settings, its base run and its rows so far."""

    def __init__(self, settings: TransferSettings, base: RunConfig, runs: Path) -> None:
        """`runs` is the folder of the run folders.

        Raises ConfigError for sizes that are no size of the base run, and what `Plan.of` raises,
        for all runs of the first sweep at once: nothing is trained before every run is known to be
        possible.
        """
        self.settings = settings
        self.base = base
        self.runs = runs
        # Asked for after every round; resolving the rules of a deep model takes milliseconds.
        self._configs: dict[tuple[Parametrization, int, float], tuple[RunConfig, str]] = {}
        if settings.calibrate_duration and base.recipe is not None:
            raise ConfigError(
                f"calibrate_duration is on, and {settings.run} takes its rules from a recipe; "
                "expected a run with rules of its own, into which the exponent can be written. "
                "Write the recipe's values out (they are in the run folder's config.yaml)."
            )
        if getattr(base.hyperparams, settings.swept) == 0:
            raise ConfigError(
                f"hyperparams.{settings.swept} is 0 in the base run, and its multiples are too; "
                "give it a positive value."
            )
        for parametrization in settings.parametrizations:
            for size in settings.sizes:
                self.points(parametrization, size, settings.log2_multiples)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the rows of this study are measurements of; a row names the rest itself."""
        return {
            "axis": self.settings.axis,
            "swept": self.settings.swept,
            "samples": self.base.evaluation.samples,
            # A run's name has the hash of its numbers, so that a fitted exponent may be written
            # into the base without its rows being refused.
            "run": identity(self.base, "seed", "parametrization", "duration_exponent"),
        }

    @cached_property
    def reference(self) -> int:
        """The size from which the best value is carried over: the base's own, else the smallest."""

        def at_base(size: int) -> bool:
            return all(ratio == 1 for _, ratio in self._moves(size))

        return next(filter(at_base, self.settings.sizes), min(self.settings.sizes))

    def sized(self, size: int) -> RunConfig:
        """The base run grown to `size`, with the base's hyperparameters and one evaluation."""
        config = self.base
        for axis, ratio in self._moves(size):
            config = moved(config, axis, ratio)
        return as_point(config)

    def _moves(self, size: int) -> tuple[tuple[Axis, float], ...]:
        """The axes to move for `size`, each with its ratio to the base run."""
        base, axis = self.base, self.settings.axis
        if axis == "joint":
            return (("width", size), ("depth", size), ("batch", size), ("duration", size * size))
        head_dim = base.model.head_dim
        if axis == "width" and size % head_dim:
            raise ConfigError(
                f"sizes has the width {size}, which model.head_dim = {head_dim} does not divide; "
                "width grows by whole heads. Use multiples of the head size."
            )
        present = {
            "width": base.model.hidden_size,
            "depth": base.model.num_layers,
            "batch": base.training.global_batch_size,
            "duration": base.train_tokens,
        }
        return ((axis, size / present[axis]),)

    def points(
        self, parametrization: Parametrization, size: int, multiples: Iterable[float]
    ) -> list[Point]:
        """The runs of one sweep, with every seed."""
        return [
            self._point(parametrization, size, multiple, seed)
            for seed in self.settings.seeds
            for multiple in multiples
        ]

    def _point(
        self, parametrization: Parametrization, size: int, multiple: float, seed: int
    ) -> Point:
        config, digest = self._config(parametrization, size, multiple)
        swept = self.settings.swept
        name = f"{self.settings.axis}{size}_{swept}{multiple:+g}_seed{seed}_{digest}"
        return Point(
            id=name,
            config=replace(config, seed=seed, run_dir=str(self.runs / name)),
            labels={
                "parametrization": parametrization,
                "size": size,
                "log2_multiple": multiple,
                "seed": seed,
                swept: getattr(config.hyperparams, swept),
            },
        )

    def _config(
        self, parametrization: Parametrization, size: int, multiple: float
    ) -> tuple[RunConfig, str]:
        """The run of any seed, with the hash of its numbers."""
        key = (parametrization, size, multiple)
        if key not in self._configs:
            sized, swept = self.sized(size), self.settings.swept
            value = getattr(sized.hyperparams, swept) * 2.0**multiple
            config = replace(
                sized,
                rules=replace(sized.rules, parametrization=parametrization),
                hyperparams=replace(sized.hyperparams, **{swept: value}),
            )
            self._configs[key] = config, numbers_hash(Plan.of(config))
        return self._configs[key]

    def sweep(
        self, parametrization: Parametrization, size: int, rows: Iterable[Row]
    ) -> list[float]:
        """The multiples that this study wants at `size`, ascending, given the rows so far.

        While the lowest mean loss lacks a neighbour on either side, or has one beyond a cliff, the
        sweep grows by one value at a time (`next_multiple`), at most max_added. A function of the
        rows alone, so that a study taken up again, or shared by several commands, wants the same
        runs.
        """
        losses = {row["id"]: row_loss(row) for row in rows}
        multiples = sorted(self.settings.log2_multiples)
        for _ in range(self.settings.max_added):
            points = self.points(parametrization, size, multiples)
            if any(point.id not in losses for point in points):
                break
            curve = mean_curve(_by_seed(points, losses))
            added = next_multiple(curve)
            if added is None:
                break
            multiples = sorted([*multiples, added])
        return multiples

    def wanted(self, rows: Sequence[Row]) -> dict[str, Point]:
        """The runs of this study by id, given the rows so far; each once, whatever it is called."""
        wanted: dict[str, Point] = {}
        for parametrization in self.settings.parametrizations:
            for size in self.settings.sizes:
                multiples = self.sweep(parametrization, size, rows)
                for point in self.points(parametrization, size, multiples):
                    wanted.setdefault(point.id, point)
        return wanted

    def missing(self, rows: Sequence[Row]) -> list[Point]:
        """The wanted runs that have no row, one seed after the other and the longest first."""
        done = {row["id"] for row in rows}
        seeds = self.settings.seeds
        return sorted(
            (point for name, point in self.wanted(rows).items() if name not in done),
            key=lambda point: (seeds.index(point.config.seed), -_cost(point.config)),
        )

    def curves(
        self, parametrization: Parametrization, size: int, rows: Sequence[Row]
    ) -> list[dict[float, float]]:
        """Validation loss by multiple, one curve per seed; infinite where a run diverged."""
        losses = {row["id"]: row_loss(row) for row in rows}
        multiples = self.sweep(parametrization, size, rows)
        return _by_seed(self.points(parametrization, size, multiples), losses)


def row_loss(row: Row) -> float:
    """The validation loss of a row in nats per token; infinite if its run diverged."""
    return math.inf if row["diverged"] else float(row["loss"])


def next_multiple(curve: Mapping[float, float]) -> float | None:
    """The value to add to a sweep for a parabola near its optimum; None if nothing is missing.

    Beyond the edge where the lowest loss lies, at the distance of the last two values. Between the
    lowest and a neighbour that diverged or lies more than CLIFF nats higher, halfway, until they
    are as close as FINEST_STEP: a parabola has nothing to say about a cliff. Where everything
    diverged, below the smallest.
    """
    xs = sorted(curve)
    lowest = min(range(len(xs)), key=lambda index: curve[xs[index]])
    if lowest == 0:
        return 2 * xs[0] - xs[1]
    if lowest == len(xs) - 1:
        return 2 * xs[-1] - xs[-2]
    for neighbour in (xs[lowest - 1], xs[lowest + 1]):
        far = curve[neighbour] > curve[xs[lowest]] + CLIFF
        if far and abs(neighbour - xs[lowest]) > FINEST_STEP:
            return (neighbour + xs[lowest]) / 2
    return None


def _by_seed(points: Iterable[Point], losses: Mapping[str, float]) -> list[dict[float, float]]:
    curves: dict[int, dict[float, float]] = {}
    for point in points:
        curve = curves.setdefault(point.config.seed, {})
        curve[point.labels["log2_multiple"]] = losses[point.id]
    return list(curves.values())


def _cost(config: RunConfig) -> float:
    return config.model.parameters * config.train_tokens
