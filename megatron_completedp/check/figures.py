"""Figures of the ladders: root mean squares against size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from megatron_completedp.check.measure import Key, Ladder
from megatron_completedp.study.report import FigureSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Mean log2 RMS by ratio, for each series.
Points = Mapping[Key, Mapping[float, float]]

#: Shown in figures: enough to see what happens and few enough to tell apart.
_SHOWN = ("embedding", "q", "o", "down", "residual", "logits")

#: The last column, which has room beside it for the names of the lines.
_LABELLED = ("o", "logits")


def change_figure(ladder: Ladder, points: Points, steps: Sequence[int]) -> FigureSpec:
    """Changes since step 0 against size, one panel per place and one line per step."""
    late = [step for step in steps if step > 0]

    def draw(figure: Figure) -> None:
        from megatron_completedp.study.plot import label_lines, ladder_colors, log2_axis

        panels = figure.subplots(2, 3, sharex=True).flat
        for axes, name in zip(panels, _SHOWN, strict=True):
            where = _where(ladder, name, points)
            for step, color in zip(late, ladder_colors(len(late)), strict=True):
                by_ratio = points.get(Key("change", name, where, step), {})
                ratios = list(by_ratio)
                values = [2 ** by_ratio[r] for r in ratios]
                axes.plot(ratios, values, "o-", color=color, label=f"step {step}")
            axes.set_title(name)
            axes.set_yscale("log", base=2)
            log2_axis(axes, ladder.ratios)
            if name in _LABELLED:
                label_lines(axes)
        figure.supxlabel(f"{ladder.axis} over the base's")
        figure.supylabel("RMS of the change since step 0")

    expected = "Flat is right."
    if ladder.axis == "depth" and ladder.alpha < 1:
        expected = "Flat is right for embedding and logits; the inside of a branch moves less with "
        expected += f"depth, down to m_L^{ladder.alpha - 1:g}."
    return FigureSpec(
        name=_name("change", ladder),
        caption=f"How far activations have moved since step 0, against {_size(ladder)}. {expected}",
        draw=draw,
        size=(7.5, 4.6),
    )


def ladder_figure(
    ladder: Ladder, points: Points, quantity: str, step: int, exponents: Mapping[str, float]
) -> FigureSpec:
    """One quantity of every module against size, over its value at the base.

    Over that at the smallest size where the ladder leaves the base out. `exponents` are the slopes
    expected by name; each is drawn as a dashed line.
    """
    start = 1.0 if 1 in ladder.ratios else min(ladder.ratios)
    over = "the base's" if start == 1 else f"that at {ladder.axis} x {start:g}"

    def draw(figure: Figure) -> None:
        from megatron_completedp.study.plot import label_lines, log2_axis

        axes = figure.subplots()
        for slope in sorted(set(exponents.values())):
            ends = (min(ladder.ratios), max(ladder.ratios))
            rise = [(end / start) ** slope for end in ends]
            axes.plot(ends, rise, "--", color="#999999", linewidth=1)
        for key, by_ratio in _of(points, quantity, step):
            rise = [2 ** (value - by_ratio[start]) for value in by_ratio.values()]
            axes.plot(list(by_ratio), rise, label=key.name)
        axes.set_yscale("log", base=2)
        log2_axis(axes, ladder.ratios)
        axes.set_xlabel(f"{ladder.axis} over the base's")
        axes.set_ylabel(f"RMS {quantity} over {over}")
        label_lines(axes)

    return FigureSpec(
        name=_name(quantity, ladder),
        caption=f"RMS {quantity} of every module against {_size(ladder)}, over {over}. Dashed: the "
        "derived exponents "
        f"({', '.join(f'{slope:g}' for slope in sorted(set(exponents.values())))}).",
        draw=draw,
        size=(5.6, 4.4),
    )


def _name(what: str, ladder: Ladder) -> str:
    """The name of a figure: depth is measured at several alphas."""
    alpha = f"_alpha{ladder.alpha:g}" if ladder.axis == "depth" else ""
    return f"{what}_{ladder.axis}{alpha}".replace(".", "_")


def _size(ladder: Ladder) -> str:
    return f"depth at alpha {ladder.alpha:g}" if ladder.axis == "depth" else ladder.axis


def _of(points: Points, quantity: str, step: int) -> Iterable[tuple[Key, Mapping[float, float]]]:
    return (
        (key, by_ratio)
        for key, by_ratio in points.items()
        if (key.quantity, key.step) == (quantity, step) and key.where in ("", "layers", "middle")
    )


def _where(ladder: Ladder, name: str, points: Points) -> str:
    """The position that stands for `name`: all layers, or the middle (the end of the stream)."""
    if name in ("embedding", "logits"):
        return ""
    if ladder.axis != "depth":
        return "layers"
    return "last" if name == "residual" else "middle"
