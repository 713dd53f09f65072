"""A report with everything that a page has to cope with, for the unit and the browser tests."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure

from megatron_completedp.study.plot import label_lines, ladder_colors, log2_axis
from megatron_completedp.study.report import FigureSpec, Finding, Report, Table

WIDTHS = (64, 128, 256, 512)
MODULES = ("embedding", "attention_norm", "q", "k", "v", "o", "gate", "up", "down", "unembedding")


def draw_curves(figure: Figure) -> None:
    """Loss against learning rate, one labelled line per width."""
    axes = figure.subplots()
    lrs = 2.0 ** np.arange(-8, -2)
    for width, color in zip(WIDTHS, ladder_colors(len(WIDTHS)), strict=True):
        loss = 4.2 - 0.05 * math.log2(width) + 0.05 * (np.log2(lrs) + 5) ** 2
        axes.plot(lrs, loss, marker="o", color=color, label=f"width {width}")
    axes.set(xlabel="learning rate", ylabel="loss (nats per token)", xscale="log")
    label_lines(axes)


def draw_panels(figure: Figure) -> None:
    """Four panels side by side, with lines that all end at nearly the same height."""
    for axes, title in zip(
        figure.subplots(1, 4, sharey=True), ("sp", "mup", "p", "dp"), strict=True
    ):
        for index in range(4):
            axes.plot(WIDTHS, [1, 1.02, 1.01, 1 + 0.002 * index], label=f"layer {index}")
        log2_axis(axes, WIDTHS)
        axes.set(title=title, xlabel="width")
        label_lines(axes)


def sample_report(*, passing: bool) -> Report:
    """A long report: 20 findings, both figure sizes, a wide table, text that looks like HTML."""
    findings = [
        Finding(
            what=f"slope of the change of {module} in {axis}, step 10",
            value=0.03,
            low=-0.1,
            high=0.1,
        )
        for module in MODULES
        for axis in ("width", "depth")
    ]
    if not passing:
        findings[3] = Finding(
            what="slope of the change of attention_norm in depth, step 10",
            value=0.4567891,
            low=-math.inf,
            high=0.1,
            note="Grows with depth: look at the residual multiplier of <layer 0> & its neighbours.",
        )
        findings[5] = Finding(what="slope of q", value=math.nan, low=-0.1, high=0.1)
    header = ("module", *(f"RMS at width {width}, step 20" for width in WIDTHS), "slope", "error")
    return Report(
        title="Coordinate check of completedp",
        question="Do activations and their updates keep their size in width and depth?",
        command="python -m megatron_completedp.check coordinate --out runs/checks/" + "long" * 30,
        findings=tuple(findings),
        figures=(
            FigureSpec(name="width", caption="Loss by width; lower is better.", draw=draw_curves),
            FigureSpec(name="again", caption="The same once more.", draw=draw_curves),
            FigureSpec(name="panels", caption="Four panels.", draw=draw_panels, size=(10.5, 3.2)),
        ),
        tables=(
            Table(
                title="Every module",
                header=header,
                rows=tuple((module, *["1.234"] * 6) for module in MODULES),
                note="RMS over the probe batch.",
            ),
        ),
        settings={"widths": "64, 128, 256, 512", "data": "seeded tokens <synthetic>"},
        exceptions=("Logits at initialization may shrink with width.", "Bias <b> is not seen."),
    )
