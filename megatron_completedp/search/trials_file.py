"""trials.jsonl: a study as text, small enough to be kept beside its figures, and read again.

The first line has the study's name and what its values mean; then one trial a line. Points are
rounded to a millionth of a nat: for reports, not for going on with the search.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from megatron_completedp.data.atomic import atomic_write
from megatron_completedp.errors import DataError
from megatron_completedp.search.attributes import (
    CODE,
    EARLIER_TRIES,
    FIRST_TRY,
    IDENTITY,
    REPLICATE,
    STOPPED,
    TAG,
    TEXT,
)
from megatron_completedp.search.objective import Facts

FILE = "trials.jsonl"

#: Digits after the point of a coordinate, in nats.
DIGITS = 6

#: What is kept of a study and of its trials; machines' names and paths are not.
STUDY_ATTRIBUTES = (IDENTITY, CODE, TEXT)
ATTRIBUTES = {*Facts.__dataclass_fields__, REPLICATE, STOPPED} - {"configs"}
SYSTEM_ATTRIBUTES = {TAG, FIRST_TRY, EARLIER_TRIES}


def write_export(study: optuna.Study, path: Path) -> None:
    """Write every trial of `study`, those under way included, to `path`: the whole file or none."""
    attributes = study.user_attrs
    header = {
        "study": study.study_name,
        **{name: attributes[name] for name in STUDY_ATTRIBUTES if name in attributes},
    }
    names = list(attributes[IDENTITY]["space"]["bounds"])
    lines = [header, *(_row(trial, names) for trial in study.get_trials(deepcopy=False))]
    with atomic_write(path) as stream:
        for line in lines:
            stream.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")


def read_export(path: Path) -> optuna.Study:
    """The study in `path`, in memory. Raises DataError for a file that is no export."""
    try:
        header, *rows = [json.loads(line) for line in path.read_bytes().splitlines()]
        bounds = header[IDENTITY]["space"]["bounds"]
        study = optuna.create_study(study_name=header["study"])
        for name in STUDY_ATTRIBUTES:
            if name in header:
                study.set_user_attr(name, header[name])
        space = {name: FloatDistribution(*pair) for name, pair in bounds.items()}
        study.add_trials([_trial(row, space) for row in rows])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not the export of a search ({type(error).__name__}: {error}); write it "
            "with `python -m megatron_completedp.search report`."
        ) from error
    return study


def _row(trial: FrozenTrial, names: list[str]) -> dict[str, Any]:
    row: dict[str, Any] = {"state": trial.state.name}
    if trial.value is not None:
        row["value"] = trial.value
    # A trial whose worker died while it asked has no point, or a part of one.
    if set(names) == set(trial.params):
        row["point"] = [round(trial.params[name], DIGITS) for name in names]
    row |= {name: item for name, item in trial.user_attrs.items() if name in ATTRIBUTES}
    system = {name: it for name, it in trial.system_attrs.items() if name in SYSTEM_ATTRIBUTES}
    return row | ({"system": system} if system else {})


def _trial(row: Mapping[str, Any], space: Mapping[str, FloatDistribution]) -> FrozenTrial:
    point = row.get("point")
    values = [] if point is None else zip(space.items(), point, strict=True)
    return optuna.trial.create_trial(
        state=TrialState[row["state"]],
        value=row.get("value"),
        # Rounding may have left the bounds.
        params={name: min(max(value, of.low), of.high) for (name, of), value in values},
        distributions={} if point is None else dict(space),
        user_attrs={name: row[name] for name in ATTRIBUTES if name in row},
        system_attrs=row.get("system", {}),
    )
