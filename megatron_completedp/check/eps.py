"""Do Adam's updates keep their size when eps is as large as the gradient? And does weight decay?

Where eps is far below the gradient, no eps rule can be told from another. So each module's eps is
put at the RMS of its own gradient at the base, and the rules have to carry it from there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_completedp.check import expected
from megatron_completedp.check.coordinate import describe, divergence, finding, places
from megatron_completedp.check.figures import ladder_figure
from megatron_completedp.check.measure import Bench, Key, Ladder, LadderSettings, slopes
from megatron_completedp.check.settings import command_line
from megatron_completedp.check.sizes import base_run
from megatron_completedp.config.run import RunConfig
from megatron_completedp.core.roles import GAIN_ROLES, MODULE_ROLES, Module
from megatron_completedp.plan.run_plan import Plan
from megatron_completedp.study.report import Finding, Report

#: The first update alone: its gradient is the one that eps was set by.
STEPS = (0, 1)

EXCEPTIONS = (
    "eps and weight decay are the check's own: eps of every module is its gradient's RMS at the "
    "base, and decay is on for gains too, so that their cells of the table are seen.",
    "QK gains: their gradient falls with up to N^-1/2 while the table, for the coherent sum, "
    "leaves their eps alone; their updates may fall by up to that.",
    "Embedding rows of rare tokens have gradients far below the RMS, those of frequent ones far "
    "above it: the embedding's update moves less with eps than the others'.",
)


@dataclass(frozen=True, kw_only=True)
class EpsSettings(LadderSettings):
    """What the eps check measures."""


def run(settings: EpsSettings, out: Path) -> Report:
    """Measure updates and decay along the ladders of `settings`, which must all be flat."""
    base = base_run(settings.run, settings.parametrization)
    ladders = settings.ladders(base, batch_and_duration=True)
    findings: list[Finding] = []
    figures = []
    near = eps_at_gradient(base)
    with Bench(near, out, steps=STEPS, optimizer=True) as bench:
        for ladder in ladders:
            found, points = slopes(bench, ladder)
            findings += divergence(bench, ladder)
            findings += examine(ladder, found, base.rules.depth_weight_decay)
            if ladder.axis in ("width", "depth"):
                figures.append(ladder_figure(ladder, points, "update", 0, {"": 0.0}))
    return Report(
        title="Eps check",
        question="Do updates keep their size when eps is as large as the gradient, and does weight "
        "decay over a run?",
        command=command_line(),
        findings=tuple(findings),
        figures=tuple(figures),
        settings=describe(bench, ladders),
        exceptions=EXCEPTIONS,
    )


def eps_at_gradient(base: RunConfig) -> RunConfig:
    """`base` with eps of each module type at the RMS of its first gradient, and decay on.

    A depth profile of eps stays and acts on top.

    The gradient is that of the base's own seed, whatever seeds are measured: with another eps, what
    was measured with some seeds could not be joined by others.
    """
    ladder = Ladder(axis="width", ratios=(1,), seeds=(base.seed,))
    with Bench(base, None, steps=STEPS) as bench:
        measured = bench.series(ladder, 1, base.seed)
    # Two digits: a restart must not be refused for the last bits of a gradient.
    eps = {
        Module(key.name): float(f"{2**value:.2g}")
        for key, value in measured.items()
        if (key.quantity, key.step) == ("gradient", 0)
    }
    # A base may lie away from where its values were tuned: the rules then scale eps here too.
    rule = {
        entry.module: factors.value / factors.tuned
        for entry in Plan.of(base).resolved.modules
        for factors in [entry.factors["eps"]]
    }
    multipliers = base.multipliers
    return replace(
        base,
        hyperparams=replace(base.hyperparams, eps=1.0, weight_decay=0.1, gain_weight_decay=0.1),
        multipliers=replace(
            multipliers,
            types={
                **multipliers.types,
                **{
                    module: replace(multipliers.of(module), eps_mult=value / rule[module])
                    for module, value in eps.items()
                },
            },
        ),
    )


def examine(ladder: Ladder, found: dict[Key, float], depth_weight_decay: str) -> Iterator[Finding]:
    """The findings of one ladder."""
    if ladder.axis in ("width", "depth"):
        for name, where in places(found, "update"):
            band = expected.update(name, ladder.axis)
            yield finding(ladder, found, ("update", name, where), [0], band)
        for name, where in places(found, "memory"):
            # Betas belong to no row of the table, and gains are too few numbers to hold them to.
            if MODULE_ROLES[Module(name)] not in GAIN_ROLES:
                band = expected.update(name, ladder.axis)
                yield finding(ladder, found, ("memory", name, where), [0], band)
    for name, where in places(found, "decay"):
        band = expected.decay(name, ladder.axis, ladder.alpha, depth_weight_decay)
        yield finding(ladder, found, ("decay", name, where), [0], band)
