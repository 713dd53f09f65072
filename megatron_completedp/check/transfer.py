"""`check transfer`: does the best learning rate of the base stay the best along a ladder?

Sweeps one hyperparameter at every size of one axis, under several parametrizations, with several
seeds and everything else pinned, and measures how far its best value moves.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megatron_completedp.check.calibrate import fitted_exponent, write_exponent
from megatron_completedp.check.drift import LadderResult, SizeResult, analyse, excess
from megatron_completedp.check.ladder import Ladder, Row
from megatron_completedp.check.settings import command_line
from megatron_completedp.check.transfer_base import small_base
from megatron_completedp.check.transfer_figures import draw_loss_by_size, draw_sweeps
from megatron_completedp.check.transfer_settings import SWEPT_NAMES, TransferSettings
from megatron_completedp.config.load import load_config
from megatron_completedp.data.manifest import text_hashes
from megatron_completedp.errors import ConfigError
from megatron_completedp.study.report import FigureSpec, Finding, Report, Table
from megatron_completedp.study.results import Results
from megatron_completedp.study.tasks import train_points


def run(settings: TransferSettings, out: Path) -> Report:
    """Train what the study lacks, then report on all of it. Rows are in OUT/results.jsonl.

    Raises ConfigError for settings and base runs that cannot be swept, StudyStopped at a signal.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}; expected a command of one process, which "
            "starts the runs itself. Start it without torchrun and set ranks and workers."
        )
    base = load_config(settings.run) if settings.run else small_base(out / "runs" / "data")
    ladder = Ladder(settings, base, out / "runs")
    text = text_hashes((*base.data.train, *base.data.valid))
    results = Results(out / "results.jsonl", ladder.identity, text=text)
    train_missing(ladder, results)
    rows = results.rows()
    found = [analyse(ladder, name, rows) for name in settings.parametrizations]
    return _report(ladder, found, rows)


def train_missing(ladder: Ladder, results: Results) -> None:
    """Train until the study wants no more: the first sweeps, then what each round adds to them."""
    settings = ladder.settings
    while missing := ladder.missing(results.rows()):
        train_points(
            missing, results, folder=ladder.runs, workers=settings.workers, ranks=settings.ranks
        )


def _report(ladder: Ladder, found: Sequence[LadderResult], rows: Sequence[Row]) -> Report:
    settings = ladder.settings
    (judged,) = (result for result in found if result.parametrization == settings.judged)
    findings = [judge(settings, judged)]
    findings += [compare(settings, result, judged) for result in found if result is not judged]
    tables = [_sweep_table(ladder, result) for result in found]
    exceptions = _limits(settings, found)
    afterwards = None
    if settings.calibrate_duration:
        exponent = fitted_exponent(ladder, judged)
        afterwards = partial(write_exponent, Path(settings.run), exponent)
    if settings.axis == "duration" and settings.swept == "lr":
        tables.append(_exponent_table(ladder, found))
    swept = SWEPT_NAMES[settings.swept]
    base = ladder.base
    return Report(
        title=f"Transfer of the {swept} along {settings.axis}",
        question=(
            f"Does the best {swept} at size {ladder.reference} stay within "
            f"{settings.max_drift:g} octaves of the best at every size, under {settings.judged}?"
        ),
        command=command_line(),
        findings=tuple(findings),
        figures=(
            FigureSpec(
                name="sweeps",
                caption=(
                    f"Validation loss against the {swept}, as a multiple of the base's value. "
                    "One curve per size, the mean of the seeds, with a band from the lowest to the "
                    "highest; stars mark fitted optima. Crosses at the top are values at which a "
                    "run diverged."
                ),
                draw=lambda figure: draw_sweeps(figure, found, settings),
                size=(6.0, 3.2 * math.ceil(len(found) / 2)),
            ),
            FigureSpec(
                name="by_size",
                caption=(
                    f"Validation loss at every size with the best {swept} of size "
                    f"{ladder.reference}, carried over and not tuned again (lines); stars are the "
                    "loss at the size's own optimum."
                ),
                draw=lambda figure: draw_loss_by_size(figure, found, settings),
            ),
        ),
        tables=tuple(tables),
        settings={
            "base run": settings.run or "built in, on the text of the Python installation",
            "base": (
                f"width {base.model.hidden_size}, {base.model.num_layers} layers, "
                f"{base.batch_tokens:,} tokens per step, {base.train_tokens:,} in all"
            ),
            "sizes": ", ".join(map(str, sorted(settings.sizes))),
            "seeds": ", ".join(map(str, settings.seeds)),
            "runs": _count(ladder, rows),
            "optimum": (
                f"parabola through the points within {settings.window:g} nats of the lowest, and "
                "its two neighbours"
            ),
        },
        exceptions=tuple(exceptions),
        afterwards=afterwards,
    )


def judge(settings: TransferSettings, judged: LadderResult) -> Finding:
    """The verdict on one parametrization; a size without an optimum fails it."""
    low, high = judged.span_interval.low, judged.span_interval.high
    note = f"95 % interval {judged.span_interval:+.2f}"
    if low <= settings.max_drift <= high:
        note += ", which holds the bound: more seeds would tell"
    note += f"; {_by_window(judged)}"
    if judged.problems:
        note = f"not bracketed: {'; '.join(judged.problems)}"
    return Finding(
        what=_what(settings, judged),
        value=judged.span,
        low=0.0,
        high=settings.max_drift,
        note=note,
    )


def compare(settings: TransferSettings, other: LadderResult, judged: LadderResult) -> Finding:
    """What the same ladder shows under a parametrization that is not judged: any number."""
    if other.problems:
        # NaN passes no bounds, and only the judged parametrization may fail the check.
        what = f"sizes without an optimum along {settings.axis}, {other.parametrization}"
        value, note = float(len(other.problems)), "; ".join(other.problems)
    else:
        what, value = _what(settings, other), other.span
        note = f"for comparison; 95 % interval {other.span_interval:+.2f}; {_by_window(other)}"
        more, interval = excess(other, judged, window=settings.window)
        if not math.isnan(more):
            note += f"; {more:+.2f} {interval:+.2f} more than {judged.parametrization}"
    return Finding(what=what, value=value, low=-math.inf, high=math.inf, note=note)


def _by_window(result: LadderResult) -> str:
    """How much of a span is the fit's own choice."""
    spans = ", ".join(f"{span:.2f} at {window:g}" for window, span in result.span_by_window.items())
    return f"by the fit's window in nats: {spans}"


def _what(settings: TransferSettings, result: LadderResult) -> str:
    name = SWEPT_NAMES[settings.swept]
    return f"octaves between the best {name}s along {settings.axis}, {result.parametrization}"


def _limits(settings: TransferSettings, found: Sequence[LadderResult]) -> list[str]:
    """What the reader must know before trusting the numbers."""
    limits = []
    if len(settings.seeds) < 2:
        limits.append("One seed: there is no interval, and no telling drift from noise.")
    elif len(settings.seeds) < 6:
        limits.append(
            f"The intervals are percentiles of a bootstrap over {len(settings.seeds)} seeds, so "
            "few that they cover less than their 95 %."
        )
    limits.append(
        "Intervals know the seeds alone. A loss curve is no parabola: how far a span moves with "
        "the window of the fit is an error that they leave out."
    )
    limits += [
        f"{result.parametrization} is not bracketed: {problem}."
        for result in found
        for problem in result.problems
    ]
    limits.append(
        f"The other hyperparameters stay at the base's values: this is a cut through their space, "
        f"and it says nothing about sizes beyond {max(settings.sizes)}."
    )
    return limits


def _sweep_table(ladder: Ladder, result: LadderResult) -> Table:
    return Table(
        title=f"{result.parametrization}: best {SWEPT_NAMES[ladder.settings.swept]} by size",
        header=(
            "size",
            "log2 multiple",
            "interval",
            "drift",
            "interval",
            "loss",
            "lost",
            "diverged",
        ),
        rows=tuple(_row(item) for item in result.sizes),
        note=(
            f"Octaves; drift is against size {ladder.reference}. Loss in nats per token at the "
            f"optimum; lost is what the best value of size {ladder.reference} costs here, by the "
            "parabola or, outside its points, as measured at the nearest value. Diverged: log2 "
            "multiples at which a seed did."
        ),
    )


def _row(item: SizeResult) -> tuple[str, ...]:
    return (
        str(item.size),
        _number(item.best.x, "+.2f"),
        f"{item.best_interval:+.2f}",
        _number(item.drift, "+.2f"),
        f"{item.drift_interval:+.2f}",
        _number(item.best.loss, ".4f"),
        _number(item.loss_lost, "+.4f"),
        ", ".join(f"{x:+g}" for x, loss in item.means.items() if math.isinf(loss)) or "none",
    )


def _exponent_table(ladder: Ladder, found: Sequence[LadderResult]) -> Table:
    rows = []
    for result in found:
        exponent = fitted_exponent(ladder, result)
        value = _number(exponent.value, ".3f")
        intervals = (f"{exponent.interval:+.2f}", f"{exponent.line_interval:+.2f}")
        rows.append((result.parametrization, value, *intervals))
    return Table(
        title="duration exponent p that the optima ask for",
        header=("parametrization", "p", "interval over seeds", "interval of the line"),
        rows=tuple(rows),
        note="best lr ~ m_D^-p, whatever part of it the parametrization already applies. The "
        "first interval knows how seeds move the optima; the second, which two durations do not "
        "have, how far the optima are from one line (Student's t). The wider one counts.",
    )


def _count(ladder: Ladder, rows: Sequence[Row]) -> str:
    """Runs that the report is about, each once; the file may have those of other seeds too."""
    wanted = ladder.wanted(rows)
    used = [row for row in rows if row["id"] in wanted]
    return f"{len(used)}, of which {sum(row['diverged'] for row in used)} diverged"


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)
