"""Many values of a trial in one transaction, or one that must not be there, into Optuna's tables.

Optuna commits every parameter and every attribute on its own; with 79 parameters that is most of
what a study costs a trial. These are the tables of version 5's schema.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import (
    StudyUserAttributeModel,
    TrialModel,
    TrialParamModel,
    TrialUserAttributeModel,
)
from sqlalchemy import delete, insert, select
from sqlalchemy.exc import IntegrityError


def write_params(
    storage: RDBStorage,
    trial_id: int,
    params: Mapping[str, float],
    distributions: Mapping[str, BaseDistribution],
) -> None:
    """Give a running trial parameters that it does not have yet."""
    rows = [
        {
            "trial_id": trial_id,
            "param_name": name,
            "param_value": value,
            "distribution_json": distribution_to_json(distributions[name]),
        }
        for name, value in params.items()
    ]
    if rows:
        with storage.engine.begin() as connection:
            connection.execute(insert(TrialParamModel), rows)


def write_attributes(storage: RDBStorage, trial_id: int, attributes: Mapping[str, Any]) -> None:
    """Set user attributes of a running trial, over those of the same names.

    Raises UpdateFinishedTrialError, as Optuna does, for a trial that has ended.
    """
    rows = [
        {"trial_id": trial_id, "key": key, "value_json": json.dumps(value)}
        for key, value in attributes.items()
    ]
    table = TrialUserAttributeModel
    with storage.engine.begin() as connection:
        state = connection.execute(
            select(TrialModel.state).where(TrialModel.trial_id == trial_id)
        ).scalar_one()
        if state.is_finished():
            raise UpdateFinishedTrialError(f"trial {trial_id} has ended: {state.name}")
        connection.execute(
            delete(table).where(table.trial_id == trial_id, table.key.in_(attributes))
        )
        connection.execute(insert(table), rows)


def write_study_once(storage: RDBStorage, study_id: int, key: str, value: Any) -> None:
    """Set a user attribute of a study, unless it has one of this name, which then stays.

    Of all that try it at once, wherever they are, one does it: names are unique in the table.
    """
    row = {"study_id": study_id, "key": key, "value_json": json.dumps(value)}
    with suppress(IntegrityError), storage.engine.begin() as connection:
        connection.execute(insert(StudyUserAttributeModel), row)
