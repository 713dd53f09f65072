"""Losses over the tokens seen, at several batches: how far they are from one curve."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from megatron_completedp.study.report import FigureSpec, Finding

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Evaluations in a run, evenly over its tokens, after the one before its first step.
EVALUATIONS = 10
#: Evaluations before this one are not compared.
FIRST_COMPARED = 3

#: Mean distance of a curve from the base's, in nats per token, from three tenths of the tokens
#: on. With the rule it is about 0.04, between two seeds 0.02, without the rule 0.2.
BAND = 0.08

#: Validation losses by batch ratio, one list per seed; a run that diverged has too few of them.
Curves = Mapping[float, Sequence[Sequence[float]]]


def is_whole(losses: Sequence[float]) -> bool:
    """Whether the run reached its last evaluation."""
    return len(losses) > EVALUATIONS


def gap(curves: Curves, ratio: float) -> float:
    """Mean distance of a curve from the base's, nats per token, both averaged over seeds.

    A run that diverged is never averaged: infinite with one at `ratio`, NaN with one at the base's.
    """
    if not all(map(is_whole, curves[1])):
        return math.nan
    if not all(map(is_whole, curves[ratio])):
        return math.inf
    one, other = (_mean(curves[r]) for r in (1, ratio))
    pairs = list(zip(one, other, strict=True))[FIRST_COMPARED:]
    return fmean(abs(a - b) for a, b in pairs)


def compare(with_rule: Curves, without: Curves) -> Iterator[Finding]:
    """The gap at every batch but the base's against the band, and the largest one without."""
    others = [ratio for ratio in with_rule if ratio != 1]
    for ratio in others:
        yield Finding(
            what=f"model: distance of the loss at batch x {ratio:g} from the base's (nats)",
            value=gap(with_rule, ratio),
            low=0,
            high=BAND,
            note=_diverged(with_rule, (1, ratio)),
        )
    diverged = _diverged(without, (1, *others))
    yield Finding(
        what="model: the largest such distance with the batch rule left out (nats)",
        value=max(gap(without, ratio) for ratio in others),
        low=BAND,
        high=float("inf"),
        note="negative control: the band would see a wrong rule; where this fails, no rule is "
        "wrong, but this run says nothing about it" + (diverged and f"; {diverged}"),
    )


def curve_figure(with_rule: Curves, without: Curves) -> FigureSpec:
    """Loss over tokens at every batch, with the rule and without."""

    def draw(figure: Figure) -> None:
        from megatron_completedp.study.plot import ladder_colors

        panels = figure.subplots(1, 2, sharey=True)
        for axes, curves, title in zip(
            panels, (with_rule, without), ("with the rule", "without"), strict=True
        ):
            ratios = sorted(curves)
            for ratio, color in zip(ratios, ladder_colors(len(ratios)), strict=True):
                _draw_runs(axes, curves[ratio], f"batch x {ratio:g}", color)
            axes.set_xlim(0, 1.02)
            axes.set_title(title)
            axes.set_xlabel("part of the tokens")
            axes.legend()
        panels[0].set_ylabel("validation loss (nats)")

    return FigureSpec(
        name="loss_over_tokens",
        caption="Validation loss over the tokens seen, at every batch; mean over seeds. Steps "
        "times the squared learning rate, the time of the equation, is in proportion to tokens. "
        "With the rule the curves come together; with the base's hyperparameters at every batch "
        "they do not. A cross at the top: a run diverged before it, and is in no mean.",
        draw=draw,
        size=(6.4, 3.6),
    )


def _draw_runs(
    axes: Axes, runs: Sequence[Sequence[float]], label: str, color: tuple[float, ...]
) -> None:
    """The mean of the runs that are whole, and a cross for each that is not."""
    whole, broken = list(filter(is_whole, runs)), [run for run in runs if not is_whole(run)]
    if whole:
        tokens = [index / EVALUATIONS for index in range(EVALUATIONS + 1)]
        axes.plot(tokens[1:], _mean(whole)[1:], label=label, color=color)
    if broken:
        # At the first evaluation that the run did not reach. There is no loss: the height is the
        # panel's own.
        missed = [len(run) / EVALUATIONS for run in broken]
        axes.plot(
            missed,
            [0.98] * len(missed),
            "x",
            color=color,
            label=f"{label}, diverged",
            transform=axes.get_xaxis_transform(),
        )


def _mean(runs: Sequence[Sequence[float]]) -> list[float]:
    return [fmean(losses) for losses in zip(*runs, strict=True)]


def _diverged(curves: Curves, ratios: Sequence[float]) -> str:
    """Which runs at `ratios` diverged, in words; empty for none."""
    counts = {ratio: sum(not is_whole(run) for run in curves[ratio]) for ratio in ratios}
    return ", ".join(
        f"{count} of {len(curves[ratio])} runs at batch x {ratio:g} diverged"
        for ratio, count in counts.items()
        if count
    )
