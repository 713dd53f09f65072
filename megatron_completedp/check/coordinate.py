"""Do activations and their updates keep their size in width and depth? (See `check.expected`.)"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from megatron_completedp.check import expected
from megatron_completedp.check.figures import change_figure
from megatron_completedp.check.measure import Bench, Key, Ladder, LadderSettings, diverged, slopes
from megatron_completedp.check.settings import command_line
from megatron_completedp.check.sizes import base_run
from megatron_completedp.study.report import Finding, Report, Table

#: Finished steps at which activations are measured.
STEPS = (0, 1, 2, 5, 10, 20)

EXCEPTIONS = (
    "Step 1 is not held to the bounds: the first update moves the logits through an unembedding "
    "that is still at its init, which shrinks in width.",
    "A finding is the mean slope over the steps it names; the table has every step. Single steps "
    "of one seed scatter by about 0.1.",
    "Along depth, networks are compared at equal parts of their depth: layer 0, the middle, the "
    "end. A mean over layers would compare the first of 2 layers with the first of 8.",
    "The residual stream at step 0 and its change fall slightly in depth: what the branches add at "
    "random vanishes as m_L^(1/2 - alpha), what they add in common stays.",
    "Batch and duration are held at step 0 only, where nothing may depend on them; how they act on "
    "training is the sde check's.",
    "fp32, no gradient clipping, constant learning rate without warmup, whatever the run says.",
)


@dataclass(frozen=True, kw_only=True)
class CoordinateSettings(LadderSettings):
    """What the coordinate check measures."""


def run(settings: CoordinateSettings, out: Path) -> Report:
    """Measure the ladders of `settings` and hold their slopes to the derived ones."""
    base = base_run(settings.run, settings.parametrization)
    ladders = settings.ladders(base, batch_and_duration=True)
    findings: list[Finding] = []
    figures, tables = [], []
    with Bench(base, out, steps=STEPS) as bench:
        for ladder in ladders:
            found, points = slopes(bench, ladder)
            findings += divergence(bench, ladder)
            findings += examine(ladder, found, STEPS)
            if ladder.axis in ("width", "depth"):
                figures.append(change_figure(ladder, points, STEPS))
                tables.append(_table(ladder, found))
    return Report(
        title="Coordinate check",
        question="Do activations, and what training does to them, keep their size at every width "
        "and depth?",
        command=command_line(),
        findings=tuple(findings),
        figures=tuple(figures),
        tables=tuple(tables),
        settings=describe(bench, ladders),
        exceptions=EXCEPTIONS,
    )


def examine(ladder: Ladder, found: dict[Key, float], steps: Sequence[int]) -> Iterator[Finding]:
    """The findings of one ladder from the slopes at `steps`."""
    axis, alpha = ladder.axis, ladder.alpha
    late = [step for step in steps if step > 1]
    for name, where in places(found, "activation"):
        band = expected.activation_at_start(name, axis, alpha)
        yield finding(ladder, found, ("activation", name, where), [0], band)
    if axis not in ("width", "depth"):
        return
    for name, where in places(found, "change"):
        band = expected.change(name, axis, alpha)
        yield finding(ladder, found, ("change", name, where), late, band)
    for name, where in places(found, "contribution"):
        band = expected.contribution(name, axis, alpha)
        yield finding(ladder, found, ("contribution", name, where), late, band)


def finding(
    ladder: Ladder,
    found: dict[Key, float],
    series: tuple[str, str, str],
    steps: Sequence[int],
    band: expected.Band,
) -> Finding:
    """The mean slope of one series over `steps` against its band."""
    quantity, name, where = series
    at = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    place = f"{name}, {where}" if where not in ("", "layers") else name
    return Finding(
        what=f"{ladder.axis}{_at_alpha(ladder)}: slope of {quantity} of {place}, {at}",
        value=fmean(found[Key(quantity, name, where, step)] for step in steps),
        low=band.low,
        high=band.high,
        note=band.note,
    )


def _at_alpha(ladder: Ladder) -> str:
    return f" (alpha {ladder.alpha:g})" if ladder.axis == "depth" else ""


def divergence(bench: Bench, ladder: Ladder) -> Iterator[Finding]:
    """A finding that fails for every engine of `ladder` that diverged."""
    for ratio, seed in diverged(bench, ladder):
        yield Finding(
            what=f"{ladder.axis} x {ratio:g} (alpha {ladder.alpha:g}), seed {seed}: diverged",
            value=math.nan,
            low=0,
            high=0,
            note="no slope of this ladder can be read; lower the base's learning rate",
        )


def places(found: dict[Key, float], quantity: str) -> list[tuple[str, str]]:
    """(name, where) of the series of `quantity`, in forward order, each once."""
    return list(dict.fromkeys((key.name, key.where) for key in found if key.quantity == quantity))


def describe(bench: Bench, ladders: Sequence[Ladder]) -> dict[str, str]:
    """The settings of a report on `ladders`."""
    model, base = bench.base.model, bench.base
    sizes = {
        f"{ladder.axis} ratios{_at_alpha(ladder)}": ", ".join(f"{r:g}" for r in ladder.ratios)
        for ladder in ladders
    }
    return {
        "parametrization": base.rules.parametrization,
        "base": f"width {model.hidden_size}, {model.num_layers} layers, head_dim {model.head_dim}, "
        f"vocabulary {model.vocab_size}, {base.batch_tokens} tokens a step, "
        f"learning rate {base.hyperparams.lr:g}",
        "data": "training text of the run" if base.data.train else "synthetic tokens",
        **sizes,
        "seeds": ", ".join(map(str, ladders[0].seeds)),
    }


def _table(ladder: Ladder, found: dict[Key, float]) -> Table:
    rows = []
    for quantity in ("activation", "change", "contribution"):
        for name, where in places(found, quantity):
            slopes_by_step = (found.get(Key(quantity, name, where, step)) for step in STEPS)
            cells = ("" if value is None else f"{value:+.2f}" for value in slopes_by_step)
            rows.append((f"{quantity} {name} {where}".rstrip(), *cells))
    alpha = f", alpha {ladder.alpha:g}" if ladder.axis == "depth" else ""
    return Table(
        title=f"Slopes in {ladder.axis}{alpha}",
        header=("log2 RMS of", *(f"step {step}" for step in STEPS)),
        rows=tuple(rows),
        note="Exponents of the size: 0 is flat, 1 doubles with every doubling.",
    )
