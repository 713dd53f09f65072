"""`search report`: what a search found, how sure that is, and what it cost, on one page.

Drawn from the study's database, of which OUT/trials.jsonl is written; or from that file alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist

import optuna
from scipy import stats

from megatron_completedp.errors import ConfigError
from megatron_completedp.search.access import Search, load
from megatron_completedp.search.attributes import CODE, IDENTITY
from megatron_completedp.search.history import Estimate, History
from megatron_completedp.search.importance import Importance, importance, rows_of
from megatron_completedp.search.objective import Objective
from megatron_completedp.search.report_figures import (
    SHOWN,
    cell,
    draw_cliffs,
    draw_heat_map,
    draw_importance,
    draw_profiles,
    draw_progress,
    heat_map_size,
    profiles,
)
from megatron_completedp.search.report_tables import changes_table, cost_table, loss_table
from megatron_completedp.search.surrogate import Valley, fit
from megatron_completedp.study.fit import student
from megatron_completedp.study.report import FigureSpec, Finding, Report


def report(search: Search, *, target: str | None, command: str) -> Report:
    """The report; `target` is the YAML of the run that the search is for."""
    study, objective = load(search), search.objective()
    history = History(study, objective.space)
    if not history.held:
        raise ConfigError(
            f"no trial of {search.settings.name!r} has ended well yet; there is nothing to report."
        )
    point = history.held[-1].point
    start, best = history.start, history.estimate(point)
    weights = importance(history, ceiling=objective.ceiling)
    return Report(
        title=f"Search {study.study_name}",
        question="Is the best point better than the base run by more than the noise of the seeds?",
        command=command,
        findings=_findings(history, point),
        figures=_figures(history, objective, point, weights),
        tables=(
            loss_table(start, best),
            changes_table(point, history.space, weights),
            cost_table(search, study, target),
        ),
        settings=_settings(search, study, objective, history),
        exceptions=_limits(history, point, weights),
    )


def _findings(history: History, point: Mapping[str, float]) -> tuple[Finding, ...]:
    gain = history.gain(point)
    if gain is None:
        note = _why_unknown(history.start, history.estimate(point))
    else:
        interval = student(gain.nats, gain.standard_error**2, gain.freedom)
        note = (
            f"{gain.nats:.4f} nats/token, 95 % interval {interval:.4f}, not corrected for choosing "
            "among challengers"
        )
    return (
        Finding(
            what="gain of the best point over the base run, in its standard errors",
            value=gain.nats / gain.standard_error if gain and gain.standard_error else math.nan,
            low=least_gain(history.challenges, gain.freedom if gain else 1),
            high=math.inf,
            note=note,
        ),
    )


def least_gain(challenges: int, freedom: int) -> float:
    """Standard errors by which the best point must be better than the start.

    Student's t quantile at which all `challenges` together pass by chance as often, 2.3 %, as one
    would at 2 known standard errors (Bonferroni).
    """
    chance = NormalDist().cdf(-2.0) / max(challenges, 1)
    return float(stats.t.ppf(1 - chance, freedom))


def _why_unknown(start: Estimate, best: Estimate) -> str:
    if math.isnan(start.mean):
        return "the base run is no trial of this study"
    if best.biased:
        return (
            "the best point was not run again, and was chosen for its one low run; `search "
            "compare` trains it with fresh seeds"
        )
    return "no point was run twice, so the noise of the seeds is not known"


def _figures(
    history: History, objective: Objective, point: Mapping[str, float], weights: Importance | None
) -> tuple[FigureSpec, ...]:
    names = history.space.names
    found = [
        FigureSpec(
            name="progress",
            caption=(
                "Validation loss against trials. The line is the best point so far, at the mean of "
                "its runs in the whole study but the one it was chosen for; those that confirmed "
                "it are among them, so that it is a little too low. Dashed is the base run. Bands "
                "are 95 % intervals from the noise of the seeds, pooled over all repeated points. "
                "Dots are single runs, triangles lie above the figure, crosses diverged."
            ),
            draw=lambda figure: draw_progress(figure, history),
            size=(6.0, 3.8),
        ),
    ]
    if weights is not None:
        found.append(
            FigureSpec(
                name="importance",
                caption=(
                    f"The {min(SHOWN, len(names))} dimensions with the largest part in the loss of "
                    "these trials, by a ridge regression on each dimension and its square, without "
                    "interactions. Grey bars are below what shuffled losses give (dashed). The fit "
                    f"predicts {weights.predicted:.0%} of the variance of left-out trials."
                ),
                draw=lambda figure: draw_importance(figure, weights),
                size=(6.0, 4.4),
            )
        )
    if any(cell(name) for name in names):
        found.append(
            FigureSpec(
                name="multipliers",
                caption=(
                    "The best point: log2 of what it multiplies, by module and hyperparameter. 0 "
                    "is the base run, +1 twice its value. Empty cells do not exist."
                ),
                draw=lambda figure: draw_heat_map(figure, point),
                size=heat_map_size(point),
            )
        )
    if shown := profiles(point):
        found.append(
            FigureSpec(
                name="profiles",
                caption="The best point's depth profiles, whose geometric mean is 1.",
                draw=lambda figure: draw_profiles(figure, point),
                size=(9.0, 0.6 + 1.9 * math.ceil(len(shown) / 4)),
            )
        )
    found.append(
        FigureSpec(
            name="cliffs",
            caption=(
                "Where runs diverged, dimension by dimension: bars span the runs that ended well, "
                "crosses are what diverged runs had moved to, blue ticks the best point. Such a "
                "run has a cross in every dimension that it moved and may be the fault of one; "
                "black ticks are the fewest cliffs that a greedy search needs to explain them."
            ),
            draw=lambda figure: draw_cliffs(figure, history, _valleys(history, objective), point),
            size=(6.0, 1.0 + 0.15 * len(names)),
        )
    )
    return tuple(found)


def _valleys(history: History, objective: Objective) -> Mapping[str, Valley]:
    if len(history.well) < 2:
        return {}
    space = history.space.distributions()
    return fit(rows_of(history), space, ceiling=objective.ceiling).valleys


def _settings(
    search: Search, study: optuna.Study, objective: Objective, history: History
) -> dict[str, str]:
    base, proposals = objective.base, study.user_attrs[IDENTITY]["proposals"]
    options = ", ".join(f"{name} {value}" for name, value in proposals["options"].items())
    diverged = len(history.finished) - len(history.well)
    return {
        "base run": search.settings.run,
        "base": (
            f"width {base.model.hidden_size}, {base.model.num_layers} layers, "
            f"{base.model.parameters:,} parameters, {base.train_tokens:,} tokens"
        ),
        "level": f"{objective.space.level}, {len(objective.space.dimensions)} dimensions",
        "sampler": f"{proposals['sampler']}, seed {proposals['seed']}"
        + (f", {options}" if options else ""),
        "trials": f"{len(history.finished)} finished, of which {diverged} diverged",
        "seeds per trial": str(objective.seeds),
        "code": ", ".join(study.user_attrs[CODE]),
    }


def _limits(
    history: History, point: Mapping[str, float], weights: Importance | None
) -> tuple[str, ...]:
    limits = [
        "The loss is that on the split the search chose by, and so a little too low for the best "
        "point. `search recipe` and `search transfer` measure on text that no trial saw.",
        "The intervals of single points contain what seeds do to all points alike; the gain is "
        "taken on equal seeds where that is sharper.",
    ]
    if history.gain(point) is None:
        why = _why_unknown(history.start, history.estimate(point))
        limits.append(f"There is no interval of the gain: {why}.")
    else:
        limits.append(
            "The gain's interval leaves out that the point won several comparisons with these very "
            f"runs. The bound allows for it: {history.challenges} points were run again."
        )
    if diverged := history.diverged(point):
        limits.append(
            f"{diverged} more runs of the best point diverged. Losses are those of the others: it "
            "is near a cliff."
        )
    if on_bound := history.space.on_bounds(point):
        limits.append(
            f"{len(on_bound)} of {len(history.space.dimensions)} dimensions of the best point lie "
            "on their bounds: wider ones might find better."
        )
    if weights is None:
        limits.append("Too few trials ended well to estimate any importance.")
    else:
        limits.append(
            f"Importance is about {len(history.well)} trials near the path of this search in "
            f"{len(history.space.dimensions)} dimensions. It sees no interactions and not what was "
            "hardly moved; dimensions that moved together share their part by chance."
        )
    return tuple(limits)
