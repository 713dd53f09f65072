"""One style for every figure of a study, and the few helpers that their drawings share.

Readable when a phone shows them 360 pixels wide, and without telling red from green: colours are
Okabe and Ito's (2008) or a run of viridis, and lines carry their names where they end.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from megatron_completedp.study.report import FigureSpec

#: Okabe and Ito's colours for colour-blind readers, those with a contrast of 3 to white (WCAG 2).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000")

STYLE: Any = {
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "axes.prop_cycle": cycler(color=COLORS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "figure.constrained_layout.use": True,
    "figure.facecolor": "white",
    "font.size": 10,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "savefig.dpi": 200,
    # Names inside the SVG come from its content and not from chance.
    "svg.hashsalt": "megatron_completedp",
}

#: Distance between two labels, in font sizes.
_LABEL_GAP = 1.25


def render(spec: FigureSpec) -> dict[str, bytes]:
    """The figure as PNG (200 dots per inch) and SVG files."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=spec.size)
        spec.draw(figure)
        # No dates and versions inside: the same figure is the same file.
        return {
            "png": _save(figure, "png", {"Software": None}),
            "svg": _save(figure, "svg", {"Date": None}),
        }


def _save(figure: Figure, kind: str, metadata: dict[str, None]) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format=kind, metadata=metadata)
    return stream.getvalue()


def ladder_colors(count: int) -> list[tuple[float, ...]]:
    """`count` colours from dark to light for sizes from small to large (viridis)."""
    # Beyond 0.6 viridis has less than a contrast of 3 to white.
    return [mpl.colormaps["viridis"](0.6 * index / max(count - 1, 1)) for index in range(count)]


def log2_axis(axes: Axes, values: Sequence[float]) -> None:
    """A horizontal axis in octaves with a tick, written as a plain number, at each of `values`."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(values)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _plain(value)))
    axes.xaxis.set_minor_locator(NullLocator())


def _plain(value: float) -> str:
    """Without an exponent: a whole number with its thousands, 1,638,400, or six digits."""
    return f"{value:,.0f}" if abs(value - round(value)) < 1e-6 * abs(value) else f"{value:g}"


def label_lines(axes: Axes) -> None:
    """Write each line's label right of its last finite point, in its colour, none over another.

    Takes the place of a legend. Call it last: it reads the limits of the axes.
    """
    size = mpl.rcParams["font.size"]
    points = axes.figure.dpi / 72
    ends = []
    for line in axes.get_lines():
        label = str(line.get_label())
        data = np.asarray(line.get_xydata(), float)
        data = data[np.isfinite(data).all(axis=1)]
        if len(data) and not label.startswith("_"):
            x, y = data[-1]
            height = axes.transData.transform((x, y))[1] / points
            ends.append((height, (x, y), label, line.get_color()))
    ends.sort(key=lambda end: end[0])
    heights = _spread([end[0] for end in ends], _LABEL_GAP * size)
    for (height, end, label, color), at in zip(ends, heights, strict=True):
        axes.annotate(
            label,
            end,
            xytext=(0.7 * size, at - height),
            textcoords="offset points",
            va="center",
            color=color,
            annotation_clip=False,
        )


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending `heights` moved as little as needed to lie `gap` apart.

    Neighbours that are too near join a group, which is centred on the mean of its members.
    """
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _top(groups[-2], gap) + gap > _bottom(groups[-1], gap):
            last = groups.pop()
            groups[-1] += last
    return [_bottom(group, gap) + gap * index for group in groups for index in range(len(group))]


def _bottom(group: Sequence[float], gap: float) -> float:
    return sum(group) / len(group) - gap * (len(group) - 1) / 2


def _top(group: Sequence[float], gap: float) -> float:
    return sum(group) / len(group) + gap * (len(group) - 1) / 2
