"""The best point of a study, and how sure its loss is."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import optuna
from optuna.trial import FrozenTrial, TrialState

from megatron_completedp.search.attributes import ended_well
from megatron_completedp.search.trust_region import TrustRegionSampler
from megatron_completedp.study.fit import pooled_deviation

_Key = tuple[tuple[str, float], ...]


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
    diverged: int
    """How many more of its trials diverged."""


def incumbent(study: optuna.Study) -> Incumbent | None:
    """The point that the study's sampler holds for the best; None before one ended well.

    Trust region: the point that challengers must beat, its loss without the run it was chosen for.
    Others: the lowest mean over a point's runs, which was chosen for being low: it is biased.
    """
    groups: dict[_Key, list[FrozenTrial]] = {}
    diverged: Counter[_Key] = Counter()
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        if ended_well(trial):
            groups.setdefault(_key(trial.params), []).append(trial)
        else:
            diverged[_key(trial.params)] += 1
    if not groups:
        return None
    if isinstance(study.sampler, TrustRegionSampler):
        state = study.sampler.state(study)
        params = study.sampler.params(study, state.incumbent)
        own = groups.get(_key(params), [])
        if not math.isfinite(state.loss) or not own:
            return None
        error = state.noise / math.sqrt(state.runs) if math.isfinite(state.noise) else math.nan
        return _incumbent(own, diverged, state.loss, error)
    best = min(groups.values(), key=_mean)
    noise, _ = pooled_deviation([[_value(trial) for trial in own] for own in groups.values()])
    return _incumbent(best, diverged, _mean(best), noise / math.sqrt(len(best)))


def _key(params: Mapping[str, float]) -> _Key:
    return tuple(sorted(params.items()))


def _incumbent(
    own: Sequence[FrozenTrial], diverged: Counter[_Key], loss: float, error: float
) -> Incumbent:
    return Incumbent(
        params=dict(own[0].params),
        loss=loss,
        standard_error=error,
        trials=tuple(trial.number for trial in own),
        diverged=diverged[_key(own[0].params)],
    )


def _mean(trials: Sequence[FrozenTrial]) -> float:
    return statistics.fmean(map(_value, trials))


def _value(trial: FrozenTrial) -> float:
    assert trial.value is not None, "a completed trial"
    return trial.value
