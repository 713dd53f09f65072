"""The study in its database: opened, held to its settings, and waited for when it is away."""

from __future__ import annotations

import json
import logging
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import RDBStorage
from sqlalchemy.engine import make_url
from sqlalchemy.exc import (
    ArgumentError,
    NoSuchModuleError,
)

from megatron_completedp.data.atomic import atomic_write
from megatron_completedp.data.claims import claim
from megatron_completedp.errors import ConfigError
from megatron_completedp.search.attributes import CODE, FOLDER_ID, IDENTITY, TEXT
from megatron_completedp.search.bulk import write_study_once
from megatron_completedp.search.settings import TRIALS_FOLDER, DatabaseSettings
from megatron_completedp.study.code import code_version
from megatron_completedp.study.results import differences, in_words, text_differences
from megatron_completedp.study.settings import masked

logger = logging.getLogger(__name__)

#: Names the output folder that a study's workers share.
FOLDER_FILE = "study.json"


#: Of libpq: seconds for a server to take a connection, and for one to answer whose machine has
#: gone without a word (the last in milliseconds).
_LIBPQ = {
    "connect_timeout": 10,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}

#: How long a driver waits, by its own names: SQLite's for its lock. Other drivers keep their own.
_PATIENCE = {"pysqlite": {"timeout": 60}, "psycopg": _LIBPQ, "psycopg2": _LIBPQ}


def connect(url: str, database: DatabaseSettings, out: Path) -> RDBStorage:
    """Optuna's storage behind `url`, its tables made where they are missing.

    `out` is the output folder, for a lock: of two workers that make the tables at once, one would
    fail. Raises ConfigError for a URL that is none or whose driver is not installed.
    """
    try:
        driver = make_url(url).get_driver_name()
        with warnings.catch_warnings(), claim(out / "claims" / "tables", wait=True):
            warnings.simplefilter("ignore", ExperimentalWarning)  # heartbeats
            storage = RDBStorage(
                url,
                engine_kwargs={"connect_args": _PATIENCE.get(driver, {})},
                heartbeat_interval=database.heartbeat_s,
                grace_period=database.grace_s,
            )
    except (ArgumentError, NoSuchModuleError, ValueError) as error:
        raise ConfigError(
            f"database.url is {masked(url)}: {masked(str(error))}. Expected SQLAlchemy's form, as "
            "postgresql+psycopg://user:password@host:5432/name or sqlite:////folder/study.db."
        ) from None  # the cause may show the password
    except ImportError as error:
        raise ConfigError(
            f"database.url is {masked(url)}, but its driver is not installed "
            f"({error.__cause__ or error}): pip install 'psycopg[binary]' and use "
            "postgresql+psycopg://, or install the driver that the URL names."
        ) from error
    return storage


def open_study(
    storage: RDBStorage,
    name: str,
    out: Path,
    *,
    identity: Mapping[str, Any],
    text: Mapping[str, str] | None = None,
    first: Mapping[str, float] | None = None,
) -> optuna.Study:
    """The study `name`, made if it does not exist; `identity` is what its values mean.

    `text` has the hashes of the token files, which are compared where both know them.
    A new study has the point `first` for its first trial; without it, the sampler's. Raises
    ConfigError, with the differences, for a study of another identity, and for one whose workers
    share another output folder.
    """
    # One of this folder at a time, so that the first one's identity stands when the next one looks.
    with claim(out / "claims" / "study", wait=True), _quiet():
        study = optuna.create_study(
            storage=storage, study_name=name, direction="minimize", load_if_exists=True
        )
        if new := IDENTITY not in study.user_attrs:
            if (out / TRIALS_FOLDER).exists():
                raise ConfigError(
                    f"{out / TRIALS_FOLDER} has the runs of another search, or of one that is no "
                    "longer in its database; this one would take them for its own. Give another "
                    "--out, or remove that folder."
                )
            # Of two searches that begin in two folders at once, the database lets one in.
            write_study_once(storage, study._study_id, FOLDER_ID, _mark(out))
        else:  # another search of this name is told what differs, wherever its folder is
            check_identity(study, identity, text=text)
        if study.user_attrs[FOLDER_ID] != _marked(out):
            raise ConfigError(
                f"the study {name!r} was started with another output folder than {out}. Its "
                "workers share one folder, which all of them must see: runs, logs and locks are "
                "in it. Give that folder, or this search another name and a new folder."
            )
        if new:
            if first is not None:
                study.enqueue_trial(dict(first), skip_if_exists=True)
            study.set_user_attr(TEXT, dict(text or {}))
            study.set_user_attr(IDENTITY, _as_read_back(identity))
        _note_code(study)
    return study


def check_identity(
    study: optuna.Study, identity: Mapping[str, Any], *, text: Mapping[str, str] | None = None
) -> None:
    """Raise ConfigError, with the differences, for a study whose values mean something else."""
    kept = study.user_attrs
    found = list(differences(kept.get(IDENTITY, {}), _as_read_back(identity)))
    if found := [*found, *text_differences(kept.get(TEXT, {}), text or {})]:
        raise ConfigError(
            f"the study {study.study_name!r} is another search than these settings: "
            f"{in_words(found)}. Give this one another --out (and another name where they share a "
            "database), or restore what differs."
        )


def _as_read_back(identity: Mapping[str, Any]) -> dict[str, Any]:
    """As a database gives it back: a tuple is a list."""
    return dict(json.loads(json.dumps(identity)))


def load_study(storage: RDBStorage, name: str) -> optuna.Study:
    """The study `name`, to be read. Raises ConfigError when there is none."""
    try:
        with _quiet():
            return optuna.load_study(storage=storage, study_name=name)
    except KeyError as error:
        names = ", ".join(optuna.get_all_study_names(storage)) or "none"
        raise ConfigError(
            f"there is no study {name!r} in this database; it has {names}. Start it with "
            "`python -m megatron_completedp.search run`, or correct name, out or database.url."
        ) from error


def _note_code(study: optuna.Study) -> None:
    """Keep the list of the versions that worked on the study."""
    now, known = code_version(), study.user_attrs.get(CODE, [])
    if now not in known:
        if known:
            logger.warning(
                "this study was begun with version %s; this is %s, which may propose other points",
                known[0],
                now,
            )
        study.set_user_attr(CODE, [*known, now])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's log lines about studies; ours say it."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _mark(out: Path) -> str:
    """Write an id into the output folder, unless it has one, and return it."""
    found = _marked(out)
    if found is None:
        found = uuid.uuid4().hex
        with atomic_write(out / FOLDER_FILE) as stream:
            stream.write(json.dumps({"folder": found}).encode() + b"\n")
    return found


def _marked(out: Path) -> str | None:
    path = out / FOLDER_FILE
    return str(json.loads(path.read_text(encoding="utf-8"))["folder"]) if path.exists() else None
