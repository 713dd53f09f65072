"""The figures of `search compare`: gain over the base run against runs, sampler by sampler."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from megatron_completedp.study.fit import Interval
from megatron_completedp.study.plot import COLORS, label_lines
from megatron_completedp.study.report import FigureSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: A value with its interval at each of several budgets.
Curve = Mapping[int, tuple[float, Interval]]


def compare_figure(kind: str, curves: Mapping[str, Curve]) -> FigureSpec:
    """Of the `kind` surrogate or training; `curves` by sampler."""
    captions = {
        "surrogate": (
            "Gain over the base run against runs on the surrogate, without noise: mean of the "
            "repeats with its 95 % interval."
        ),
        "training": (
            "Gain over the base run of the points that the searches held for the best, trained "
            "again: held-out loss below the base's with the same seed. Means with 95 % intervals "
            "over studies, or over seeds where a sampler has one study."
        ),
    }
    return FigureSpec(
        name=kind,
        caption=captions[kind],
        draw=partial(_draw, curves=curves, marked=kind == "training"),
        size=(6.0, 3.8),
    )


def _draw(figure: Figure, curves: Mapping[str, Curve], *, marked: bool) -> None:
    axes = figure.subplots()
    styles = ("-", "--")
    for index, (name, of) in enumerate(curves.items()):
        color, style = COLORS[index % len(COLORS)], styles[index // len(COLORS) % 2]
        runs = sorted(of)
        means = [of[each][0] for each in runs]
        axes.plot(runs, means, style, color=color, label=name, marker="o" if marked else None)
        low, high = ([getattr(of[each][1], side) for each in runs] for side in ("low", "high"))
        axes.fill_between(runs, low, high, color=color, alpha=0.15, linewidth=0)
    axes.axhline(0, color="#777777", linewidth=0.8)
    axes.set(xlabel="runs", ylabel="gain over the base run (nats/token)")
    label_lines(axes)
