"""Do gradients scale in width and depth as the rules were derived? (See `core.tables`.)"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_completedp.check import expected
from megatron_completedp.check.coordinate import describe, divergence, finding, places
from megatron_completedp.check.figures import ladder_figure
from megatron_completedp.check.measure import Bench, Key, Ladder, LadderSettings, slopes
from megatron_completedp.check.settings import command_line
from megatron_completedp.check.sizes import base_run
from megatron_completedp.core.tables import Parametrization
from megatron_completedp.study.report import Finding, Report

#: Finished steps before the gradients that are averaged; the last step has none.
STEPS = (0, 1, 2, 5, 10, 11)

EXCEPTIONS = (
    "A finding is the mean slope over the first gradient and those after 1, 2, 5 and 10 steps: at "
    "step 0 alone the gradients upstream fall faster than 1/N, later more slowly.",
    "QK gains are shared by all heads: between 0 and -1/2 in width, which no eps rule can follow.",
)


@dataclass(frozen=True, kw_only=True)
class GradientSettings(LadderSettings):
    """What the gradient check measures."""


def run(settings: GradientSettings, out: Path) -> Report:
    """Measure the ladders of `settings` and hold their slopes to the derived ones."""
    base = base_run(settings.run, settings.parametrization)
    ladders = settings.ladders(base, batch_and_duration=False)
    parametrization = base.rules.parametrization
    findings: list[Finding] = []
    figures = []
    with Bench(base, out, steps=STEPS) as bench:
        for ladder in ladders:
            found, points = slopes(bench, ladder)
            findings += divergence(bench, ladder)
            findings += examine(ladder, found, STEPS, parametrization)
            exponents = {
                name: expected.gradient(name, ladder.axis, ladder.alpha, parametrization).middle
                for name, _ in places(found, "gradient")
            }
            figures.append(ladder_figure(ladder, points, "gradient", 0, exponents))
    return Report(
        title="Gradient check",
        question="Do gradients scale with width and depth as the rules assume?",
        command=command_line(),
        findings=tuple(findings),
        figures=tuple(figures),
        settings=describe(bench, ladders),
        exceptions=EXCEPTIONS,
    )


def examine(
    ladder: Ladder,
    found: dict[Key, float],
    steps: Sequence[int],
    parametrization: Parametrization = "completedp",
) -> Iterator[Finding]:
    """The findings of one ladder from the slopes at all of `steps` but the last."""
    for name, where in places(found, "gradient"):
        band = expected.gradient(name, ladder.axis, ladder.alpha, parametrization)
        yield finding(ladder, found, ("gradient", name, where), steps[:-1], band)
