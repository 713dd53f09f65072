"""What a study's rows say: the optimum at every size, how far it moved, and what that costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_completedp.check.ladder import Ladder, Row
from megatron_completedp.core.tables import Parametrization
from megatron_completedp.study.fit import (
    Interval,
    Optimum,
    SeedCurve,
    bootstrap,
    mean_curve,
    optimum,
)


@dataclass(frozen=True, kw_only=True)
class SizeResult:
    """One sweep, all seeds together. Optima and drifts are log2 of multiples, i.e. octaves."""

    size: int
    seeds: tuple[SeedCurve, ...]
    """Validation loss by multiple for each seed; infinite where the run diverged."""
    means: Mapping[float, float]
    """Mean over the seeds; infinite where any of them diverged."""
    best: Optimum
    best_interval: Interval
    drift: float
    """Optimum here minus that of the reference size; NaN unless both are bracketed."""
    drift_interval: Interval
    transferred: float
    """Loss at the reference's optimum; infinite where runs diverge there, NaN if not swept."""

    @property
    def loss_lost(self) -> float:
        """Nats that the reference's optimum costs here, compared with the optimum here."""
        return self.transferred - self.best.loss


@dataclass(frozen=True, kw_only=True)
class LadderResult:
    """The sweeps of one parametrization along the ladder, smallest size first."""

    parametrization: Parametrization
    sizes: tuple[SizeResult, ...]
    span: float
    """Octaves between the outermost optima; NaN when a size has none."""
    span_interval: Interval
    """Over the seeds; it takes the window as given."""
    span_by_window: Mapping[float, float]
    """The span by half, once and twice the settings' window: what the fit itself makes of it."""

    @property
    def problems(self) -> list[str]:
        """Why a size has no optimum to read off."""
        return [
            f"size {item.size}: {item.best.problem}" for item in self.sizes if item.best.problem
        ]


def analyse(ladder: Ladder, parametrization: Parametrization, rows: Sequence[Row]) -> LadderResult:
    """The result of one parametrization, once every run it wants has a row.

    Intervals resample the seeds of all sizes together, because a seed's data order is the same at
    every size of a width or depth ladder.
    """
    sizes = sorted(ladder.settings.sizes)
    count = len(ladder.settings.seeds)
    window = ladder.settings.window
    curves = {size: ladder.curves(parametrization, size, rows) for size in sizes}

    def optima(drawn: Sequence[int]) -> dict[int, Optimum]:
        return {size: best_of(seeds, drawn, window=window) for size, seeds in curves.items()}

    def result(size: int) -> SizeResult:
        def drift(drawn: Sequence[int]) -> float:
            found = optima(drawn)
            return found[size].x - found[ladder.reference].x

        means = mean_curve(curves[size])
        return SizeResult(
            size=size,
            seeds=tuple(curves[size]),
            means=means,
            best=best[size],
            best_interval=bootstrap(count, lambda drawn: optima(drawn)[size].x),
            drift=drift(everyone),
            drift_interval=bootstrap(count, drift),
            transferred=loss_at(best[ladder.reference].x, means, best[size]),
        )

    everyone = range(count)
    best = optima(everyone)
    return LadderResult(
        parametrization=parametrization,
        sizes=tuple(result(size) for size in sizes),
        span=span_of(curves.values(), everyone, window=window),
        span_interval=bootstrap(
            count, lambda drawn: span_of(curves.values(), drawn, window=window)
        ),
        span_by_window={
            factor * window: span_of(curves.values(), everyone, window=factor * window)
            for factor in (0.5, 1.0, 2.0)
        },
    )


def excess(other: LadderResult, judged: LadderResult, *, window: float) -> tuple[float, Interval]:
    """Octaves that `other` drifts more than `judged`, with an interval; NaN without optima.

    Both are resampled together: they share seeds, and so their noise in part.
    """

    def difference(drawn: Sequence[int]) -> float:
        far, near = (
            span_of([item.seeds for item in result.sizes], drawn, window=window)
            for result in (other, judged)
        )
        return far - near

    count = len(judged.sizes[0].seeds)
    return difference(range(count)), bootstrap(count, difference)


def span_of(curves: Iterable[Sequence[SeedCurve]], drawn: Sequence[int], *, window: float) -> float:
    """Octaves between the outermost optima of the sizes' curves; NaN when one has none."""
    found = [best_of(seeds, drawn, window=window).x for seeds in curves]
    return math.nan if any(map(math.isnan, found)) else max(found) - min(found)


def best_of(seeds: Sequence[SeedCurve], drawn: Sequence[int], *, window: float) -> Optimum:
    """The optimum by the mean over the `drawn` seeds, which may name one several times."""
    return optimum(mean_curve([seeds[index] for index in drawn]), window=window)


def loss_at(x: float, means: Mapping[float, float], best: Optimum) -> float:
    """The loss at `x`: by the parabola among its points, else the mean at the nearest value.

    So it is the parabola's own minimum at the optimum, and no line is drawn over a cliff. Infinite
    where runs diverge at that value, NaN outside the sweep.
    """
    if best.bracketed and best.used[0] <= x <= best.used[-1]:
        return best.at(x)
    if not min(means) <= x <= max(means):
        return math.nan
    return means[min(means, key=lambda value: abs(value - x))]
