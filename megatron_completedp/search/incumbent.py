"""The best point of a study, and how sure its loss is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import optuna
from optuna.trial import FrozenTrial, TrialState

from megatron_completedp.search.trust_region import TrustRegionSampler
from megatron_completedp.search.trust_trials import DIVERGED, REPLICATE


@dataclass(frozen=True)
class Incumbent:
    """A point and the trials that ran it."""

    params: Mapping[str, float]
    loss: float
    """Mean validation loss, nats per token."""
    standard_error: float
    """Of that mean, from the seed noise; NaN where no point was run twice."""
    trials: tuple[int, ...]
    """Numbers of its trials that ended well."""
    replicates: tuple[int, ...]
    """Which of the point's runs they are."""


def incumbent(study: optuna.Study) -> Incumbent | None:
    """The point that the study's sampler holds for the best; None before one ended well.

    Trust region: the point that challengers must beat, its loss without the run it was chosen for.
    Others: the lowest mean over a point's runs, which was chosen for being low: it is biased.
    """
    groups: dict[tuple[tuple[str, float], ...], list[FrozenTrial]] = {}
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        if not trial.user_attrs.get(DIVERGED):
            groups.setdefault(tuple(sorted(trial.params.items())), []).append(trial)
    if not groups:
        return None
    if isinstance(study.sampler, TrustRegionSampler):
        state = study.sampler.state(study)
        params = study.sampler.params(study, state.incumbent)
        own = groups.get(tuple(sorted(params.items())), [])
        if not math.isfinite(state.loss) or not own:
            return None
        error = state.noise / math.sqrt(state.runs) if math.isfinite(state.noise) else math.nan
        return _incumbent(own, state.loss, error)
    best = min(groups.values(), key=_mean)
    noise = _noise(list(groups.values()))
    return _incumbent(best, _mean(best), noise / math.sqrt(len(best)))


def _incumbent(own: Sequence[FrozenTrial], loss: float, error: float) -> Incumbent:
    return Incumbent(
        params=dict(own[0].params),
        loss=loss,
        standard_error=error,
        trials=tuple(trial.number for trial in own),
        replicates=tuple(trial.user_attrs.get(REPLICATE, 0) for trial in own),
    )


def _mean(trials: Sequence[FrozenTrial]) -> float:
    return statistics.fmean(float(trial.value or 0.0) for trial in trials)


def _noise(groups: Sequence[Sequence[FrozenTrial]]) -> float:
    """Pooled standard deviation of a trial within its point; NaN without a repeated point."""
    freedom = sum(len(group) - 1 for group in groups)
    if freedom == 0:
        return math.nan
    squares = sum(
        (float(trial.value or 0.0) - _mean(group)) ** 2 for group in groups for trial in group
    )
    return math.sqrt(squares / freedom)
