"""The figures of a search: how it got down, what it found, where runs broke, what mattered."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.ticker import MaxNLocator

from megatron_completedp.search.attributes import is_diverged
from megatron_completedp.search.history import Estimate, History
from megatron_completedp.search.importance import Importance
from megatron_completedp.search.surrogate import Valley
from megatron_completedp.study.plot import COLORS, label_lines, ladder_colors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Height, as a part of the axes, of what lies above them: diverged runs, and those off the scale.
TOP = 0.97
#: Dimensions that the figure of importance shows.
SHOWN = 20
#: Halves of a span that lies in the middle of a colour map still take black text.
_DARK = 0.6


@dataclass(frozen=True)
class Cell:
    """A dimension's place in the heat map."""

    row: str
    column: str


def cell(name: str) -> Cell | None:
    """Where `name` belongs; None for one of a layer, which the depth figure shows."""
    section, *rest = name.split(".")
    if section == "types":
        return Cell(rest[0], rest[1].removesuffix("_mult"))
    if section == "hyperparams":
        return Cell("all modules", rest[0])
    if not rest:
        return Cell(section.removesuffix("_residual_mult") + " branch", "residual")
    return None


def short(name: str) -> str:
    """A dimension's name without what all of them share."""
    return name.removeprefix("types.").removeprefix("hyperparams.").replace("_mult", "")


def draw_progress(figure: Figure, history: History) -> None:
    """Every run as a dot, the best so far as steps with a band, the start as a line with a band."""
    axes = figure.subplots()
    start, last = history.start, max(history.places.values(), default=1)
    steps = [(held.since, history.estimate(held.point)) for held in history.held]
    low, high = _range([start.mean, *(each.mean for _, each in steps)])
    well = [(history.places[trial.number], trial.value or 0.0) for trial in history.well]
    inside = [(place, loss) for place, loss in well if loss <= high]
    places, losses = [place for place, _ in inside], [loss for _, loss in inside]
    axes.plot(places, losses, "o", color="#999999", markersize=2.5)
    above = [place for place, loss in well if loss > high]
    over = axes.get_xaxis_transform()
    axes.plot(above, [TOP] * len(above), "^", color="#999999", markersize=3, transform=over)
    broken = [history.places[trial.number] for trial in history.finished if is_diverged(trial)]
    axes.plot(broken, [TOP] * len(broken), "x", color=COLORS[1], markersize=4, transform=over)
    if not math.isnan(start.mean):
        ends = [1, last]
        axes.plot(ends, [start.mean] * 2, "--", color=COLORS[4], linewidth=1.2, label="base run")
        _band(axes, ends, [start, start], COLORS[4])
    if steps:
        xs = [*(since for since, _ in steps), max(last, steps[-1][0])]
        estimates = [*(each for _, each in steps), steps[-1][1]]
        axes.step(xs, [each.mean for each in estimates], where="post", color=COLORS[0],
                  label="best so far")  # fmt: skip
        _band(axes, xs, estimates, COLORS[0])
    axes.set_ylim(low, high)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="trials", ylabel="validation loss (nats/token)")
    label_lines(axes)


def _range(means: Sequence[float]) -> tuple[float, float]:
    """Limits that show what was gained; what lies above is marked at the top."""
    finite = [mean for mean in means if math.isfinite(mean)] or [0.0]
    gained = max(max(finite) - min(finite), 0.01)
    return min(finite) - 0.3 * gained, max(finite) + 0.8 * gained


def _band(axes: Axes, xs: Sequence[float], estimates: Sequence[Estimate], color: str) -> None:
    low = [each.interval.low for each in estimates]
    high = [each.interval.high for each in estimates]
    axes.fill_between(xs, low, high, step="post", color=color, alpha=0.18, linewidth=0)


def draw_heat_map(figure: Figure, point: Mapping[str, float]) -> None:
    """log2 of what the point multiplies, modules down and hyperparameters across."""
    cells = {place: value for name, value in point.items() if (place := cell(name)) is not None}
    rows = list(dict.fromkeys(place.row for place in cells))
    columns = list(dict.fromkeys(place.column for place in cells))
    values = np.full((len(rows), len(columns)), math.nan)
    for place, value in cells.items():
        values[rows.index(place.row), columns.index(place.column)] = value / math.log(2)
    axes = figure.subplots()
    axes.grid(visible=False)
    span = max(float(np.nanmax(abs(values))), 0.1)
    image = axes.imshow(values, cmap="PuOr", norm=TwoSlopeNorm(0, -span, span), aspect="auto")
    for row, column in zip(*np.nonzero(~np.isnan(values)), strict=True):
        value = float(values[row, column])
        color = "white" if abs(value) > _DARK * span else "black"
        axes.text(column, row, f"{value:+.2f}", ha="center", va="center", color=color, fontsize=8)
    axes.set_xticks(range(len(columns)), [_wrapped(name) for name in columns])
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    figure.colorbar(image, ax=axes, label="log2 of the multiplier", shrink=0.8)


def heat_map_size(point: Mapping[str, float]) -> tuple[float, float]:
    """Inches for `draw_heat_map`."""
    cells = [place for name in point if (place := cell(name)) is not None]
    rows, columns = {place.row for place in cells}, {place.column for place in cells}
    return max(5.0, 2.4 + 0.85 * len(columns)), 1.3 + 0.3 * len(rows)


def _wrapped(name: str) -> str:
    return name.replace("one_minus_", "1 - ").replace("_", "\n")


def profiles(point: Mapping[str, float]) -> dict[str, dict[str, list[float]]]:
    """log2 factors by layer, by hyperparameter and then module; without their mean over layers.

    The module is `all` for what every module of a layer shares.
    """
    found: dict[str, dict[str, dict[int, float]]] = {}
    for name, value in point.items():
        section, *rest = name.split(".")
        if section in ("depth", "layers"):
            *module, multiplier, layer = rest
            of = found.setdefault(multiplier.removesuffix("_mult"), {})
            of.setdefault(module[0] if module else "all", {})[int(layer)] = value
    return {
        multiplier: {module: _centred(layers) for module, layers in of.items()}
        for multiplier, of in found.items()
    }


def _centred(layers: Mapping[int, float]) -> list[float]:
    values = [layers[layer] for layer in sorted(layers)]
    mean = math.fsum(values) / len(values)
    return [(value - mean) / math.log(2) for value in values]


def draw_profiles(figure: Figure, point: Mapping[str, float]) -> None:
    """One panel per hyperparameter, one line per module (or one that all modules share)."""
    found = profiles(point)
    rows = math.ceil(len(found) / 4)
    panels = figure.subplots(rows, 4, sharex=True, sharey=True, squeeze=False)
    for axes, (name, of) in zip(panels.flat, found.items(), strict=False):
        axes.axhline(0, color="#777777", linewidth=0.8)
        for (module, values), color in zip(of.items(), ladder_colors(len(of)), strict=True):
            depths = [(layer + 0.5) / len(values) for layer in range(len(values))]
            label = module if len(of) > 1 else "_all"
            axes.plot(depths, values, "o-", color=color, markersize=4, label=label)
        axes.set_title(name.replace("one_minus_", "1 - "), fontsize=9)
        axes.set_xticks([0, 0.5, 1], ["0", "1/2", "1"])
        if len(of) > 1:
            axes.legend(fontsize=5, ncols=2)
    for axes in panels.flat[len(found) :]:
        axes.set_visible(False)
    figure.supxlabel("(layer + 1/2) / layers", fontsize="medium")
    figure.supylabel("log2 of the factor", fontsize="medium")


def draw_cliffs(
    figure: Figure, history: History, valleys: Mapping[str, Valley], best: Mapping[str, float]
) -> None:
    """A line per dimension: where runs ended well (bar), where they diverged (crosses), the best.

    `valleys` has the cliffs that would explain the diverged runs (black ticks).
    """
    axes = figure.subplots()
    names = history.space.names
    good = [trial.params for trial in history.well]
    bad = [trial.params for trial in history.finished if is_diverged(trial)]
    octave = math.log(2)
    for row, name in enumerate(names):
        values = [params.get(name, 0.0) / octave for params in good] or [0.0]
        axes.barh(row, max(values) - min(values), left=min(values), height=0.5, color="#c6d8e8")
        moved = [params[name] / octave for params in bad if params.get(name)]
        axes.plot(moved, [row] * len(moved), "x", color=COLORS[1], markersize=3.5)
        cliffs = (valleys[name].cliff_low, valleys[name].cliff_high) if name in valleys else ()
        for cliff in cliffs:
            if math.isfinite(cliff):
                axes.plot([cliff / octave] * 2, [row - 0.45, row + 0.45], color=COLORS[4])
        axes.plot(best.get(name, 0.0) / octave, row, "|", color=COLORS[0], markersize=8)
    axes.axvline(0, color="#777777", linewidth=0.8)
    axes.set_yticks(range(len(names)), [short(name) for name in names], fontsize=7)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("log2 of the multiplier")


def draw_importance(figure: Figure, found: Importance) -> None:
    """The most important dimensions as bars, with what shuffled losses give as a line."""
    axes = figure.subplots()
    ranked = sorted(found.nats.items(), key=lambda item: -item[1])[:SHOWN]
    values = [value for _, value in ranked]
    colors = [COLORS[0] if value > found.chance else "#aaaaaa" for value in values]
    axes.barh(range(len(ranked)), values, color=colors, height=0.7)
    axes.axvline(found.chance, color=COLORS[1], linewidth=1.2, linestyle="--")
    axes.annotate("chance", (found.chance, len(ranked) - 0.5), xytext=(3, 0), color=COLORS[1],
                  textcoords="offset points", va="bottom")  # fmt: skip
    axes.set_yticks(range(len(ranked)), [short(name) for name, _ in ranked], fontsize=8)
    axes.set_ylim(len(ranked) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("standard deviation of its part of the loss (nats/token)")
