"""A trial's whole point in one write.

`study.ask(distributions)` commits every parameter on its own; with 79 of them that is most of what
a study costs a trial.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import optuna
from optuna.distributions import FloatDistribution, distribution_to_json
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import TrialParamModel
from sqlalchemy import insert


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
    if "fixed_params" in now.system_attrs:  # enqueued by hand: Optuna's way, one by one
        asked = {name: trial.suggest_float(name, of.low, of.high) for name, of in space.items()}
        return trial, asked
    params = {name: float(value) for name, value in now.params.items()}
    rows = []
    for name, of in space.items():
        if name in params:
            continue
        if name in trial.relative_params:
            value = trial.relative_params[name]
        else:
            value = study.sampler.sample_independent(study, now, name, of)
        params[name] = float(value)
        rows.append(
            {
                "trial_id": trial._trial_id,
                "param_name": name,
                "param_value": params[name],
                "distribution_json": distribution_to_json(of),
            }
        )
    if rows:
        with storage.engine.begin() as connection:
            connection.execute(insert(TrialParamModel), rows)
    return trial, params
