"""`search compare`: which sampler gets furthest with the same number of runs?

On a surrogate of training, many repeats in seconds; and by real training: the points that finished
studies held for the best after equal budgets, trained again with fresh seeds on held-out text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from megatron_completedp.search.compare import Step, compare
from megatron_completedp.search.compare_settings import CompareSettings
from megatron_completedp.search.held_points import HeldPoints
from megatron_completedp.search.surrogate import Surrogate, synthetic
from megatron_completedp.study.fit import Interval, bootstrap
from megatron_completedp.study.plot import COLORS, label_lines
from megatron_completedp.study.report import FigureSpec, Finding, Report, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: A value with its interval at each of several budgets.
Curve = Mapping[int, tuple[float, Interval]]


def run(settings: CompareSettings, out: Path, *, command: str) -> Report:
    """Train and simulate what the settings ask, and report. Rows are in OUT/results.jsonl.

    Raises ConfigError for studies that cannot be compared, StudyStopped at a signal.
    """
    held = HeldPoints(settings, out / "runs") if settings.studies else None
    surrogate = held.surrogate() if held else synthetic()
    # As in the real searches; a synthetic space has the samplers' default.
    radius = {each.name: each.radius for each in held.space.dimensions} if held else 0.5
    gained = simulated(surrogate, settings, radius=radius)
    curves = {"surrogate": {name: _curve(of) for name, of in gained.items()}}
    if held:
        trained = held.gains(held.train(out))
        curves["training"] = {name: _real_curve(of, settings) for name, of in trained.items()}
    return Report(
        title="Samplers at equal budget",
        question=(
            f"Does {settings.judged} gain at least as much as the best of the others, by the means "
            "(point estimates; how sure they are, their intervals say)?"
        ),
        command=command,
        findings=tuple(_finding(settings.judged, of, kind) for kind, of in curves.items()),
        figures=tuple(_figure(kind, of) for kind, of in curves.items()),
        tables=tuple(_table(kind, of) for kind, of in curves.items()),
        settings={
            "base run": settings.run or "none",
            "surrogate": _described(surrogate, fitted=held is not None),
            "surrogate runs": f"{settings.runs}, {settings.repeats} repeats",
            "studies": ", ".join(f"{len(of)} of {name}" for name, of in settings.studies.items())
            or "none",
            "seeds": ", ".join(map(str, settings.seeds)),
            "held out": ", ".join(settings.heldout) or "-",
        },
        exceptions=_limits(settings),
    )


def simulated(
    surrogate: Surrogate, settings: CompareSettings, *, radius: float | Mapping[str, float]
) -> dict[str, list[dict[int, float]]]:
    """Nats gained over the base without noise, by sampler: a curve over runs for each repeat.

    `radius` is the region's at the start, as `samplers.make_sampler` takes it.
    """
    start = surrogate.loss(dict.fromkeys(surrogate.valleys, 0.0))
    found: dict[str, list[dict[int, float]]] = {
        name: [{} for _ in range(settings.repeats)] for name in settings.samplers
    }
    step: Step
    runs, repeats = settings.runs, settings.repeats
    for step in compare(surrogate, settings.samplers, runs=runs, repeats=repeats, radius=radius):
        # Before a point is held, the base run would be used.
        gained = start - step.loss if math.isfinite(step.loss) else 0.0
        found[step.sampler][step.repeat][step.runs] = gained
    return found


def _curve(repeats: Sequence[Mapping[int, float]]) -> Curve:
    """Mean over repeats with its bootstrap interval, at each number of runs."""
    return {runs: _mean([repeat[runs] for repeat in repeats]) for runs in repeats[0]}


def _real_curve(studies: Sequence[Sequence[Sequence[float]]], settings: CompareSettings) -> Curve:
    """Mean over studies and seeds by budget; the interval resamples studies, or a lone one's seeds.

    What differs between repeats is more than what differs between seeds, so repeats are the units
    where there are any.
    """
    found = {}
    for index, budget in enumerate(settings.budgets):
        by_study = [study[index] for study in studies]
        units = by_study[0] if len(by_study) == 1 else [fmean(seeds) for seeds in by_study]
        found[budget] = _mean(units)
    return found


def _mean(units: Sequence[float]) -> tuple[float, Interval]:
    return fmean(units), bootstrap(len(units), lambda drawn: fmean(units[i] for i in drawn))


def _finding(judged: str, curves: Mapping[str, Curve], kind: str) -> Finding:
    last = {name: of[max(of)] for name, of in curves.items()}
    best = max((name for name in last if name != judged), key=lambda name: last[name][0])
    ours, theirs = (f"{last[name][0]:.4f} {_bracket(last[name][1])}" for name in (judged, best))
    return Finding(
        what=f"gain of {judged} minus that of {best}, {kind}, after {max(curves[judged])} runs",
        value=last[judged][0] - last[best][0],
        low=0.0,
        high=math.inf,
        note=f"point estimate, nats/token; {ours} against {theirs}, 95 % intervals",
    )


def _bracket(found: Interval) -> str:
    return "-" if math.isnan(found.low) else f"[{found.low:+.4f}, {found.high:+.4f}]"


def _figure(kind: str, curves: Mapping[str, Curve]) -> FigureSpec:
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


def _table(kind: str, curves: Mapping[str, Curve]) -> Table:
    every = sorted(next(iter(curves.values())))
    shown = every if kind == "training" else [every[len(every) // 2], every[-1]]
    rows = []
    for name, of in curves.items():
        cells: list[str] = []
        for runs in shown:
            mean, interval = of[runs]
            cells += [f"{mean:+.4f}", _bracket(interval)]
        rows.append((name, *cells))
    header = [part for runs in shown for part in (f"after {runs}", "95 % interval")]
    return Table(
        title=f"Gain over the base run: {kind}",
        header=("sampler", *header),
        rows=tuple(rows),
        note="Nats per token.",
    )


def _described(surrogate: Surrogate, *, fitted: bool) -> str:
    origin = "fitted to the studies' trials" if fitted else "synthetic, see search/surrogate.py"
    cliffs = sum(
        math.isfinite(edge)
        for valley in surrogate.valleys.values()
        for edge in (valley.cliff_low, valley.cliff_high)
    )
    gain = surrogate.loss(dict.fromkeys(surrogate.valleys, 0.0)) - surrogate.best
    return (
        f"{origin}: {len(surrogate.valleys)} dimensions, {cliffs} cliffs, noise "
        f"{surrogate.noise:.4f}, {gain:.4f} nats to gain"
    )


def _limits(settings: CompareSettings) -> tuple[str, ...]:
    limits = [
        "The surrogate is separable, and what its optimum gains beyond the trials it was fitted to "
        "is extrapolated: it ranks samplers, it does not predict losses.",
    ]
    if not settings.studies:
        limits.append("No real training: the ranking is that on a synthetic landscape.")
    elif any(len(paths) < 2 for paths in settings.studies.values()):
        limits.append(
            "A sampler with one study has an interval over training seeds alone; another seed of "
            "its proposals may come out elsewhere."
        )
    return tuple(limits)
