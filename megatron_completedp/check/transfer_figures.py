"""The figures of a transfer study: loss against the swept value, and loss against size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_completedp.check.drift import LadderResult, SizeResult
from megatron_completedp.check.transfer_settings import SWEPT_NAMES, TransferSettings
from megatron_completedp.study.plot import COLORS, label_lines, ladder_colors, log2_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Height, as a part of the axes, at which diverged values are marked.
TOP = 0.97

SIZE_NAMES = {
    "width": "hidden size",
    "depth": "layers",
    "batch": "sequences per step",
    "duration": "tokens",
    "joint": "multiple of width, depth and batch",
}


def draw_sweeps(figure: Figure, found: Sequence[LadderResult], settings: TransferSettings) -> None:
    """One panel per parametrization, one curve per size, a star at each optimum."""
    columns = min(len(found), 2)
    panels = figure.subplots(
        math.ceil(len(found) / columns), columns, sharex=True, sharey=True, squeeze=False
    )
    for axes, result in zip(panels.flat, found, strict=False):
        colors = ladder_colors(len(result.sizes))
        for item, color in zip(result.sizes, colors, strict=True):
            _draw_sweep(axes, item, color)
        axes.set_title(result.parametrization)
        label_lines(axes)
    for index in range(len(found), panels.size):
        panels.flat[index].set_visible(False)
        panels.flat[index - columns].tick_params(labelbottom=True)
    figure.supxlabel(f"log2 of the {SWEPT_NAMES[settings.swept]} / the base's", fontsize="medium")
    figure.supylabel("validation loss (nats/token)", fontsize="medium")


def _draw_sweep(axes: Axes, item: SizeResult, color: tuple[float, ...]) -> None:
    means = {x: loss for x, loss in item.means.items() if math.isfinite(loss)}
    xs = list(means)
    axes.plot(xs, list(means.values()), "o-", color=color, markersize=3, label=f"{item.size:,}")
    axes.fill_between(
        xs,
        [min(seed[x] for seed in item.seeds) for x in xs],
        [max(seed[x] for seed in item.seeds) for x in xs],
        color=color,
        alpha=0.2,
        linewidth=0,
    )
    diverged = [x for x, loss in item.means.items() if math.isinf(loss)]
    axes.plot(
        diverged,
        [TOP] * len(diverged),
        "x",
        color=color,
        transform=axes.get_xaxis_transform(),
        label="_diverged",
    )
    if item.best.bracketed:
        axes.plot(item.best.x, item.best.loss, "*", color=color, markersize=12, label="_best")


def draw_loss_by_size(
    figure: Figure, found: Sequence[LadderResult], settings: TransferSettings
) -> None:
    """Loss with the transferred value against size, a line per parametrization; stars: tuned."""
    axes = figure.subplots()
    for rank, (result, color) in enumerate(zip(found, COLORS, strict=False)):
        sizes = [item.size for item in result.sizes]
        # Matplotlib leaves NaN out, but scales its axis to infinity.
        carried = [
            item.transferred if math.isfinite(item.transferred) else math.nan
            for item in result.sizes
        ]
        tuned = [item.best.loss for item in result.sizes]
        # Thinner and thinner: two parametrizations may have the same numbers here.
        width = 1.8 * (len(found) - rank)
        name = result.parametrization
        axes.plot(sizes, carried, "o-", color=color, linewidth=width, label=name)
        axes.plot(
            sizes, tuned, "*", color=color, markersize=11, markeredgecolor="white", label="_tuned"
        )
    log2_axis(axes, sorted(settings.sizes))
    axes.set(xlabel=SIZE_NAMES[settings.axis], ylabel="validation loss (nats/token)")
    label_lines(axes)
