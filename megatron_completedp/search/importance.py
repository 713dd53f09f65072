"""Which dimensions moved the loss among the trials that a search has, and whether that is known.

The loss is regressed on each dimension and its square (`surrogate.fit`: a ridge, no interactions).
A dimension's importance is the standard deviation of its part of the fit over the trials. That is
about these trials: a dimension that hardly moved, or whose runs diverged, is not seen, and few
trials tell few dimensions apart. So two numbers say how far to trust it: how much of the loss of
trials that were left out the fit predicts, and how important dimensions look on shuffled losses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from optuna.distributions import FloatDistribution

from megatron_completedp.search.attributes import is_diverged, replicate_of
from megatron_completedp.search.history import History
from megatron_completedp.search.surrogate import Row, Surrogate, fit

#: Parts of the trials that are left out in turn.
FOLDS = 5
#: Nats above the best run within which a quadratic is fitted.
VALLEY = 1.0
#: Shuffles of the losses.
SHUFFLES = 10
#: Trials that ended well below which there is nothing to say.
LEAST = 2 * FOLDS


@dataclass(frozen=True)
class Importance:
    """What the trials say of each dimension."""

    nats: Mapping[str, float]
    """Standard deviation of the dimension's part of the loss over the trials."""
    chance: float
    """The largest of these on shuffled losses, on average; smaller ones may be chance."""
    predicted: float
    """See the function of this name."""


def rows_of(history: History, first: float = math.inf) -> list[Row]:
    """The finished trials for `surrogate.fit`; a dimension that a trial lacks is at 0.

    Of the `first` that were begun, repetitions of lost ones left out.
    """
    names = history.space.names
    return [
        Row(
            {name: trial.params.get(name, 0.0) for name in names},
            math.nan if trial.value is None else trial.value,
            diverged=is_diverged(trial),
            chosen=history.chosen_for(trial),
            replicate=replicate_of(trial),
        )
        for trial in history.finished
        if history.places[trial.number] <= first
    ]


def in_the_valley(rows: Sequence[Row]) -> list[Row]:
    """The diverged rows, and those within VALLEY nats of the best.

    Above that something broke, and one such run would outweigh all the others in a fit.
    """
    best = min((row.loss for row in rows if not row.diverged), default=math.inf)
    return [row for row in rows if row.diverged or row.loss <= best + VALLEY]


def importance(history: History, *, ceiling: float) -> Importance | None:
    """Estimated from the runs `in_the_valley`; None for too few."""
    rows = [row for row in in_the_valley(rows_of(history)) if not row.diverged]
    if len(rows) < LEAST or len({row.loss for row in rows}) == 1:
        return None
    space = history.space.distributions()
    generator = np.random.default_rng(0)
    losses = [row.loss for row in rows]
    largest = []
    for _ in range(SHUFFLES):
        shuffled = generator.permutation(losses)
        null = [Row(row.point, float(loss)) for row, loss in zip(rows, shuffled, strict=True)]
        largest.append(max(_parts(fit(null, space, ceiling=ceiling), rows).values()))
    return Importance(
        nats=_parts(fit(rows, space, ceiling=ceiling), rows),
        chance=fmean(largest),
        predicted=predicted(rows, space, ceiling=ceiling),
    )


def predicted(
    rows: Sequence[Row], space: Mapping[str, FloatDistribution], *, ceiling: float
) -> float:
    """Share of the variance of left-out `rows`, a fifth at a time, that a fit to the rest predicts.

    Below 0 it is worse than the mean, NaN where there is no variance. All runs of a point are left
    out together.
    """
    points = [tuple(row.point.values()) for row in rows]
    distinct = list(dict.fromkeys(points))
    fold = dict(
        zip(distinct, np.random.default_rng(0).permutation(len(distinct)) % FOLDS, strict=True)
    )
    part = np.array([fold[point] for point in points])
    losses = np.array([row.loss for row in rows])
    predictions = np.empty(len(rows))
    for index in range(FOLDS):
        found = fit(
            [row for row, own in zip(rows, part, strict=True) if own != index],
            space,
            ceiling=ceiling,
        )
        out = np.flatnonzero(part == index)
        predictions[out] = [found.loss(rows[int(i)].point) for i in out]
    spread = float(((losses - losses.mean()) ** 2).sum())
    return 1 - float(((losses - predictions) ** 2).sum()) / spread if spread else math.nan


def _parts(found: Surrogate, rows: Sequence[Row]) -> dict[str, float]:
    parts = {}
    for name, valley in found.valleys.items():
        x = np.array([row.point[name] for row in rows])
        parts[name] = float(np.std((valley.slope + valley.curvature * x) * x))
    return parts
