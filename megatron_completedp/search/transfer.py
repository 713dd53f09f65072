"""`search transfer`: how many tokens does a recipe save, at the proxy and where it is carried to?

The recipe and the best global values are carried to every size by the same rules and trained for
several durations; what is compared is tokens at equal loss, on text that no search chose by.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

from megatron_completedp.config.load import load_config
from megatron_completedp.plan.run_plan import Plan
from megatron_completedp.search.heldout import text_of
from megatron_completedp.search.saving import Saving, outside, saving
from megatron_completedp.search.transfer_figures import draw_transfer
from megatron_completedp.search.transfer_runs import TransferRuns
from megatron_completedp.search.transfer_settings import TransferSettings
from megatron_completedp.study.fit import SeedCurve, mean_curve
from megatron_completedp.study.report import FigureSpec, Finding, Report, Table
from megatron_completedp.study.results import Results
from megatron_completedp.study.tasks import train_points

#: Losses per seed, by size and then recipe.
Curves = Mapping[str, Mapping[str, Sequence[SeedCurve]]]
#: By size and then recipe, the baseline left out.
Savings = Mapping[str, Mapping[str, Saving]]


def run(settings: TransferSettings, out: Path, *, command: str) -> Report:
    """Train what the study lacks, then report on all of it. Rows are in OUT/results.jsonl.

    Raises ConfigError for recipes and sizes that do not belong to the base run, StudyStopped at a
    signal.
    """
    runs = TransferRuns(settings, load_config(settings.run), out / "runs")
    results = Results(out / "results.jsonl", runs.identity, text=text_of(runs.base))
    train_points(
        runs.points(),
        results,
        folder=runs.folder,
        workers=settings.workers,
        ranks=settings.ranks,
    )
    return report(runs, results, command=command)


def report(runs: TransferRuns, results: Results, *, command: str) -> Report:
    """What the rows say; every run must have one."""
    settings, rows = runs.settings, results.rows()
    curves = {
        size: {recipe: runs.curves(recipe, size, rows) for recipe in settings.recipes}
        for size in settings.sizes
    }
    savings = {
        size: {
            recipe: saving(of[settings.baseline], seeds, _reference(runs, size))
            for recipe, seeds in of.items()
            if recipe != settings.baseline
        }
        for size, of in curves.items()
    }
    judged = {size: of[settings.judged] for size, of in savings.items()}
    return Report(
        title=f"Transfer of {settings.judged}",
        question=(
            f"Does {settings.judged} reach the loss of {settings.baseline} with fewer tokens, at "
            f"{' and '.join(settings.sizes)}: by the ratio asked for as a point estimate, and by "
            "more than the scatter of the seeds?"
        ),
        command=command,
        findings=tuple(_findings(settings, curves, savings)),
        figures=(
            FigureSpec(
                name="tokens",
                caption=(
                    "Held-out loss against tokens; each point is runs of their own, with their own "
                    "schedule. Mean of the seeds, band from the lowest to the highest. The arrow "
                    f"leads from the tokens of {settings.baseline} to those with which "
                    f"{settings.judged} has the same loss; in the corner, their ratio with its "
                    "95 % interval."
                ),
                draw=partial(draw_transfer, curves=curves, savings=judged),
                size=(4.2 * len(curves), 3.6),
            ),
        ),
        tables=(_ratio_table(savings), *(_loss_table(curves[size], size) for size in curves)),
        settings=_settings(runs, len(rows)),
        exceptions=_limits(settings),
    )


def _reference(runs: TransferRuns, size: str) -> float:
    settings = runs.settings
    reference = settings.sizes[size].reference
    return math.log2(runs.config(settings.baseline, size, reference).train_tokens)


def _findings(settings: TransferSettings, curves: Curves, savings: Savings) -> list[Finding]:
    found = []
    for size, by_recipe in savings.items():
        for recipe, each in by_recipe.items():
            judged = recipe == settings.judged
            what = f"tokens of {settings.baseline} over those of {recipe}, {size}"
            note = f"point estimate; 95 % interval {each.interval:.2f}"
            if math.isnan(each.needed):
                note = outside(mean_curve(curves[size][recipe]), each.level)
                if not judged:
                    continue  # NaN passes no bounds, and only the judged recipe may fail
            found.append(
                Finding(
                    what=what,
                    value=each.ratio,
                    low=settings.sizes[size].least_ratio if judged else -math.inf,
                    high=math.inf,
                    note=note if judged else f"for comparison; {note}",
                )
            )
            if judged and not math.isnan(each.needed):
                found.append(
                    Finding(
                        what=f"{what}: lower end of the 95 % interval",
                        value=each.interval.low,
                        low=1.0,
                        strict=True,
                        high=math.inf,
                        note="must be above 1, the ratio of a recipe that saves nothing",
                    )
                )
    return found


def _ratio_table(savings: Savings) -> Table:
    rows = []
    for size, by_recipe in savings.items():
        for recipe, each in by_recipe.items():
            ratio = "-" if math.isnan(each.needed) else f"{each.ratio:.2f}"
            where = (f"{2**each.reference:,.0f}", f"{each.level:.4f}")
            rows.append((f"{size}, {recipe}", ratio, f"{each.interval:.2f}", *where))
    return Table(
        title="Tokens at equal loss",
        header=("size, recipe", "ratio", "95 % interval", "at tokens", "at loss"),
        rows=tuple(rows),
        note=(
            "Tokens of the baseline over those of the recipe at the loss of the baseline, by "
            "interpolating the recipe's loss linearly over the log of its tokens. Above 1 saves. "
            "Intervals are Student's over the seeds, in the log of the ratio."
        ),
    )


def _loss_table(of: Mapping[str, Sequence[SeedCurve]], size: str) -> Table:
    rows = []
    for recipe, seeds in of.items():
        for x in sorted(seeds[0]):
            losses = [seed[x] for seed in seeds]
            spread = "-"
            if len(losses) > 1 and all(map(math.isfinite, losses)):
                spread = f"{stdev(losses):.4f}"
            mean = f"{fmean(losses):.4f}" if all(map(math.isfinite, losses)) else "diverged"
            rows.append((recipe, f"{2**x:,.0f}", mean, spread))
    return Table(
        title=f"Held-out loss: {size}",
        header=("recipe", "tokens", "loss", "deviation over seeds"),
        rows=tuple(rows),
    )


def _settings(runs: TransferRuns, count: int) -> dict[str, str]:
    settings, base = runs.settings, runs.base
    found = {
        "base run": settings.run,
        "recipes": ", ".join(f"{name}: {path or 'the base run'}"
                             for name, path in settings.recipes.items()),
        "seeds": ", ".join(map(str, settings.seeds)),
        "held out": ", ".join(settings.heldout),
        "runs": str(count),
    }  # fmt: skip
    for name, size in settings.sizes.items():
        config = runs.config(settings.baseline, name, size.reference)
        compute = Plan.of(config).budget.flops / Plan.of(base).budget.flops
        found[name] = (
            f"width {config.model.hidden_size}, {config.model.num_layers} layers, "
            f"{config.model.parameters:,} parameters, {config.batch_tokens:,} tokens per step; at "
            f"{config.train_tokens:,} tokens {compute:.3g} times the base's compute"
        )
    return found


def _limits(settings: TransferSettings) -> tuple[str, ...]:
    limits = [
        "Interpolation over few durations; a ratio is only given where the loss was reached "
        "between two of them.",
        "The cost of the search is not in the ratio: `search report` has it.",
    ]
    if len(settings.seeds) < 2:
        limits.append("One seed: there is no interval.")
    return tuple(limits)
