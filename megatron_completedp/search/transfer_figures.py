"""The figure of `search transfer`: loss against tokens, and the tokens that a recipe saves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from matplotlib.ticker import FuncFormatter

from megatron_completedp.search.saving import Saving
from megatron_completedp.study.fit import SeedCurve, mean_curve
from megatron_completedp.study.plot import COLORS, label_lines, log2_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_transfer(
    figure: Figure,
    curves: Mapping[str, Mapping[str, Sequence[SeedCurve]]],
    savings: Mapping[str, Saving],
) -> None:
    """A panel per size, a line per recipe; an arrow from the baseline's tokens to those needed.

    `curves` are per seed, by size and then recipe; `savings` are the judged recipe's by size.
    """
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, (size, by_recipe) in zip(panels, curves.items(), strict=True):
        for index, (recipe, seeds) in enumerate(by_recipe.items()):
            _draw_curve(axes, recipe, seeds, COLORS[index % len(COLORS)])
        _draw_arrow(axes, savings[size])
        tokens = sorted({2**x for seeds in by_recipe.values() for x in seeds[0]})
        log2_axis(axes, tokens)
        unit, name = _unit(tokens[-1])
        axes.xaxis.set_major_formatter(FuncFormatter(partial(_in_units, unit)))
        axes.margins(x=0.08, y=0.12)
        axes.set(title=size, xlabel=f"tokens ({name})")
        label_lines(axes)
    panels[0].set_ylabel("held-out loss (nats/token)")


def _draw_curve(axes: Axes, recipe: str, seeds: Sequence[SeedCurve], color: str) -> None:
    means = {x: loss for x, loss in mean_curve(seeds).items() if math.isfinite(loss)}
    tokens = [2**x for x in means]
    axes.plot(tokens, list(means.values()), "o-", color=color, markersize=4, label=recipe)
    axes.fill_between(
        tokens,
        [min(seed[x] for seed in seeds) for x in means],
        [max(seed[x] for seed in seeds) for x in means],
        color=color,
        alpha=0.2,
        linewidth=0,
    )


def _draw_arrow(axes: Axes, found: Saving) -> None:
    if math.isnan(found.needed):
        return
    start, end = 2**found.reference, 2**found.needed
    axes.annotate(
        "",
        xy=(end, found.level),
        xytext=(start, found.level),
        arrowprops={"arrowstyle": "->", "color": "#333333", "linewidth": 1.4},
    )
    interval = "" if math.isnan(found.interval.low) else f" {found.interval:.2f}"
    # Losses fall to the right: this corner is free.
    text, corner = f"{found.ratio:.2f}x{interval}", axes.transAxes
    axes.text(0.98, 0.97, text, transform=corner, ha="right", va="top")


def _unit(most: float) -> tuple[float, str]:
    """In which an axis up to `most` tokens is labelled: once, since labels are near each other."""
    units = ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))
    return next((unit for unit in units if most >= 0.1 * unit[0]), units[-1])


def _in_units(unit: float, tokens: float, position: int) -> str:
    return f"{tokens / unit:.3g}"
