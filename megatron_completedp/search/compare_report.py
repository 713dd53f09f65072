"""`search compare`: which sampler gets furthest with the same number of runs?

On a surrogate of training, many repeats in seconds; and by real training: the points that finished
studies held for the best after equal budgets, trained again with fresh seeds on held-out text.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import fmean, variance
from typing import TYPE_CHECKING, Any

from megatron_completedp.search.compare import compare
from megatron_completedp.search.compare_settings import CompareSettings
from megatron_completedp.search.held_points import HeldPoints
from megatron_completedp.search.surrogate import Surrogate, synthetic
from megatron_completedp.study.code import sources_hash
from megatron_completedp.study.fit import Interval, mean_interval, student
from megatron_completedp.study.plot import COLORS, label_lines
from megatron_completedp.study.report import FigureSpec, Finding, Report, Table
from megatron_completedp.study.results import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Nats gained over the base run, by sampler: by number of runs for each repeat or seed.
Gains = Mapping[str, Sequence[Mapping[int, float]]]
#: A value with its interval at each of several budgets.
Curve = Mapping[int, tuple[float, Interval]]


def run(settings: CompareSettings, out: Path, *, command: str) -> Report:
    """Train and simulate what the settings ask, and report.

    Rows are in OUT/results.jsonl (training) and OUT/surrogate.jsonl. Raises ConfigError for studies
    that cannot be compared, StudyStopped at a signal.
    """
    held = HeldPoints(settings, out / "runs") if settings.studies else None
    surrogate = held.surrogate() if held else synthetic()
    # As in the real searches; a synthetic space has the samplers' defaults.
    region = held.space.trust_region() if held else {}
    gained = {"surrogate": simulated(surrogate, settings, out, region=region)}
    if held:
        trained = held.gains(held.train(out))
        gained["training"] = {name: _by_budget(of, settings) for name, of in trained.items()}
    return Report(
        title="Samplers at equal budget",
        question=(
            f"Does {settings.judged} gain more than the best of the others, by more than the "
            "scatter?"
        ),
        command=command,
        findings=tuple(
            finding for kind, of in gained.items() for finding in _findings(settings, of, kind)
        ),
        figures=tuple(_figure(kind, _curves(of)) for kind, of in gained.items()),
        tables=tuple(_table(kind, _curves(of), settings) for kind, of in gained.items()),
        settings={
            "base run": settings.run or "none",
            "surrogate": _described(surrogate, held),
            "surrogate runs": f"{settings.runs}, {settings.repeats} repeats",
            "studies": ", ".join(f"{len(of)} of {name}" for name, of in settings.studies.items())
            or "none",
            "seeds": ", ".join(map(str, settings.seeds)),
            "held out": ", ".join(settings.heldout) or "-",
        },
        exceptions=_limits(settings),
    )


def simulated(
    surrogate: Surrogate,
    settings: CompareSettings,
    out: Path,
    *,
    region: Mapping[str, Mapping[str, Any]],
) -> Gains:
    """Nats gained over the base without noise, by sampler: a curve over runs for each repeat.

    `region` is as `Space.trust_region` gives it. Repeats are kept in OUT/surrogate.jsonl and not
    simulated again by the same code.
    """
    start = surrogate.loss(dict.fromkeys(surrogate.valleys, 0.0))
    results = Results(out / "surrogate.jsonl", {})
    # A row of another surrogate, length or code is left where it is, and not taken for these.
    key = surrogate_key(surrogate, region=region, runs=settings.runs)

    def kept() -> dict[tuple[str, int], Mapping[str, Any]]:
        return {(row["sampler"], row["repeat"]): row for row in results.rows() if row["of"] == key}

    steps = compare(
        surrogate,
        settings.samplers,
        runs=settings.runs,
        repeats=settings.repeats,
        region=region,
        leave_out=kept().keys(),
    )
    for (sampler, repeat), of in groupby(steps, key=lambda step: (step.sampler, step.repeat)):
        whole = list(of)
        # Before a point is held, the base run would be used.
        gains = [start - step.loss if math.isfinite(step.loss) else 0.0 for step in whole]
        row = {"of": key, "sampler": sampler, "repeat": repeat, "diverged": whole[-1].diverged}
        results.append({**row, "gains": [round(gain, 6) for gain in gains]})
    done = kept()
    return {
        name: [
            dict(enumerate(done[name, repeat]["gains"], start=1))
            for repeat in range(settings.repeats)
        ]
        for name in settings.samplers
    }


def surrogate_key(
    surrogate: Surrogate, *, region: Mapping[str, Mapping[str, Any]], runs: int
) -> str:
    """Identity of a simulated curve: surrogate to six digits, region, runs, hash of the sources."""
    of = surrogate
    rows: list[list[object]] = [[of.level, of.noise, of.seed_noise, of.ceiling, runs]]
    for name, valley in of.valleys.items():
        rows.append([name, *astuple(valley), *(each[name] for each in region.values())])
    text = [[f"{x:.6g}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    return hashlib.sha256(f"{text} {sources_hash()}".encode()).hexdigest()[:16]


def _by_budget(
    studies: Sequence[Sequence[Sequence[float]]], settings: CompareSettings
) -> list[dict[int, float]]:
    """Gains by budget for each unit: a study, by the mean over seeds, or a lone study's seeds.

    What differs between repeats is more than what differs between seeds, so repeats are the units
    where there are any.
    """
    if len(studies) == 1:
        units = list(zip(*studies[0], strict=True))
    else:
        units = [tuple(fmean(seeds) for seeds in study) for study in studies]
    return [dict(zip(settings.budgets, unit, strict=True)) for unit in units]


def _curves(gained: Gains) -> dict[str, Curve]:
    """Mean over the units with its interval, at each number of runs."""
    return {
        name: {runs: _mean([unit[runs] for unit in units]) for runs in units[0]}
        for name, units in gained.items()
    }


def _mean(units: Sequence[float]) -> tuple[float, Interval]:
    return fmean(units), mean_interval(units)


def _findings(settings: CompareSettings, gained: Gains, kind: str) -> Iterator[Finding]:
    """The gain of the judged sampler over the best of the others, and the lower end of that."""
    judged, last = settings.judged, max(gained[settings.judged][0])
    units = {name: [unit[last] for unit in of] for name, of in gained.items()}
    best = max((name for name in units if name != judged), key=lambda name: fmean(units[name]))
    ours, theirs = units[judged], units[best]
    # Repeats on the surrogate share their noise, and seeds of lone studies the base run's scatter.
    paired = kind == "surrogate" or len(settings.studies[judged]) == 1
    interval = (_paired if paired else _welch)(ours, theirs)
    diverged = [
        f"a point that {name} held diverged with a fresh seed"
        for name, of in ((judged, ours), (best, theirs))
        if -math.inf in of
    ]
    what = f"gain of {judged} minus that of {best}, {kind}, after {last} runs"
    yield Finding(
        what=what,
        value=fmean(ours) - fmean(theirs),
        low=-math.inf,
        high=math.inf,
        note="; ".join([f"nats/token; {fmean(ours):.4f} against {fmean(theirs):.4f}", *diverged]),
    )
    yield Finding(
        what=f"{what}: lower end of its 95 % interval",
        value=interval.low,
        # A tie shows nothing.
        low=math.nextafter(0.0, math.inf),
        high=math.inf,
        note=f"{_bracket(interval)} over {len(ours)} {'pairs' if paired else 'studies'}, "
        "Student's t",
    )


def _paired(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """Of the mean difference, pair by pair; NaN for one pair."""
    return mean_interval([a - b for a, b in zip(ours, theirs, strict=True)])


def _welch(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """Of the difference of two means of independent studies, at least two each."""
    if not all(map(math.isfinite, (*ours, *theirs))):
        return Interval(math.nan, math.nan)
    parts = [variance(each) / len(each) for each in (ours, theirs)]
    squares = sum(
        part**2 / (len(each) - 1) for part, each in zip(parts, (ours, theirs), strict=True)
    )
    freedom = sum(parts) ** 2 / squares if squares else 1.0
    return student(fmean(ours) - fmean(theirs), sum(parts), freedom)


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


def _table(kind: str, curves: Mapping[str, Curve], settings: CompareSettings) -> Table:
    every = sorted(next(iter(curves.values())))
    shown = [runs for runs in every if runs in settings.budgets or runs == every[-1]]
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


def _described(surrogate: Surrogate, held: HeldPoints | None) -> str:
    origin = "synthetic, see search/surrogate.py"
    if held:
        origin = (
            "fitted to the studies' trials, of which it predicts "
            f"{held.predicted():.0%} of the variance where they are left out"
        )
    cliffs = sum(
        math.isfinite(edge)
        for valley in surrogate.valleys.values()
        for edge in (valley.cliff_low, valley.cliff_high)
    )
    gain = surrogate.loss(dict.fromkeys(surrogate.valleys, 0.0)) - surrogate.best
    return (
        f"{origin}: {len(surrogate.valleys)} dimensions, {cliffs} cliffs, noise "
        f"{surrogate.noise:.4f} beside the seeds' {surrogate.seed_noise:.4f}, {gain:.4f} nats to "
        "gain"
    )


def _limits(settings: CompareSettings) -> tuple[str, ...]:
    limits = [
        "The surrogate is separable, and what its optimum gains beyond the trials it was fitted to "
        "is extrapolated: it ranks samplers, it does not predict losses. Without interactions it "
        "is also the kindest landscape there is to steps along a linear fit.",
        "trust_region's settings were chosen on studies like these; the others have defaults.",
    ]
    if not settings.studies:
        limits.append("No real training: the ranking is that on a synthetic landscape.")
    elif any(len(paths) < 2 for paths in settings.studies.values()):
        limits.append(
            "A sampler with one study has an interval over training seeds alone; another seed of "
            "its proposals may come out elsewhere."
        )
    return tuple(limits)
