"""`search compare`: which sampler gets furthest with the same number of runs?

On a surrogate of training, with many repeats; and by real training: the points that finished
studies held for the best after equal budgets, trained again with fresh seeds on held-out text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, variance

from megatron_completedp.search.compare_figures import Curve, compare_figure
from megatron_completedp.search.compare_settings import CompareSettings
from megatron_completedp.search.held_points import HeldPoints
from megatron_completedp.search.simulate import Gains, simulated
from megatron_completedp.search.surrogate import Surrogate, synthetic
from megatron_completedp.study.fit import Interval, mean_interval, student
from megatron_completedp.study.report import Finding, Report, Table


def run(settings: CompareSettings, out: Path, *, command: str) -> Report:
    """Train and simulate what the settings ask, and report.

    Rows are in OUT/results.jsonl (training) and OUT/surrogate.jsonl. Raises ConfigError for studies
    that cannot be compared, StudyStopped at a signal.
    """
    held = HeldPoints(settings, out / "runs") if settings.studies else None
    surrogate = held.surrogate() if held else synthetic()
    # As in the real searches; a synthetic space has the samplers' defaults.
    region = held.space.trust_region() if held else {}
    gained = {
        "surrogate": simulated(
            surrogate,
            settings.samplers,
            out / "surrogate.jsonl",
            runs=settings.runs,
            repeats=settings.repeats,
            region=region,
            options=held.options() if held else {},
        )
    }
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
        figures=tuple(compare_figure(kind, _curves(of)) for kind, of in gained.items()),
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
        low=0.0,
        strict=True,  # a tie shows nothing
        high=math.inf,
        note=f"{interval:+.4f} over {len(ours)} {'pairs' if paired else 'studies'}, Student's t",
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


def _table(kind: str, curves: Mapping[str, Curve], settings: CompareSettings) -> Table:
    every = sorted(next(iter(curves.values())))
    shown = [runs for runs in every if runs in settings.budgets or runs == every[-1]]
    rows = []
    for name, of in curves.items():
        cells: list[str] = []
        for runs in shown:
            mean, interval = of[runs]
            cells += [f"{mean:+.4f}", f"{interval:+.4f}"]
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
