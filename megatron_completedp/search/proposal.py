"""The next trial of a study with its whole point, written at once."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import optuna
from optuna.distributions import FloatDistribution
from optuna.storages import RDBStorage

from megatron_completedp.search.attributes import FIXED
from megatron_completedp.search.bulk import write_params


def propose(
    study: optuna.Study, storage: RDBStorage, space: Mapping[str, FloatDistribution]
) -> tuple[optuna.Trial, dict[str, float]]:
    """The next trial of `study`, as `study.ask(space)` gives it, and its parameters.

    `storage` is the study's own. The trial's parameters are asked from the study's sampler, but for
    those that a repeated or enqueued trial has. The study holds one space, so that Optuna's
    comparison with earlier trials' distributions is left out.
    """
    with warnings.catch_warnings():
        # Optuna only knows the heartbeats of its own loop; ours are `storage.heartbeat`.
        warnings.filterwarnings("ignore", message="Heartbeat of storage")
        trial = study.ask()
    now = storage.get_trial(trial._trial_id)
    if FIXED in now.system_attrs:  # enqueued by hand: Optuna's way, one by one
        asked = {name: trial.suggest_float(name, of.low, of.high) for name, of in space.items()}
        return trial, asked
    params = {name: float(value) for name, value in now.params.items()}
    new = {}
    for name, of in space.items():
        if name in params:
            continue
        if name in trial.relative_params:
            value = trial.relative_params[name]
        else:
            value = study.sampler.sample_independent(study, now, name, of)
        new[name] = float(value)
    write_params(storage, trial._trial_id, new, space)
    return trial, {**params, **new}
