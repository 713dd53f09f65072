"""The study in its database: opened, held to its settings, and waited for when it is away."""

from __future__ import annotations

import json
import logging
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any, TypeVar

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError

from megatron_completedp.data.atomic import atomic_write
from megatron_completedp.data.claims import claim
from megatron_completedp.errors import CompletedPError, ConfigError
from megatron_completedp.search.settings import TRIALS_FOLDER, DatabaseSettings
from megatron_completedp.study.code import code_version
from megatron_completedp.study.crew import Stop, StudyStopped
from megatron_completedp.study.results import differences, text_differences
from megatron_completedp.study.settings import masked

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Between two tries to reach the database, at first and at most.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0

#: Names the output folder that a study's workers share.
FOLDER_FILE = "study.json"


class DatabaseUnreachable(CompletedPError):
    """The study's database did not answer for as long as it is waited for."""


def persist(call: Callable[[], T], database: DatabaseSettings, stop: Stop | None = None) -> T:
    """`call()`, again and again while the database cannot be reached.

    `call` must be able to be repeated. Raises DatabaseUnreachable after `database.retry_s`,
    StudyStopped when `stop` is set while waiting, and at once whatever else `call` raises.
    """
    start, pause = time.monotonic(), FIRST_PAUSE_S
    while True:
        try:
            return call()
        except (SQLAlchemyError, StorageInternalError) as error:
            reason = _outage(error)
            if reason is None:
                raise
            if time.monotonic() + pause - start > database.retry_s:
                raise DatabaseUnreachable(
                    f"the study's database cannot be reached for {database.retry_s:g} s: {reason}. "
                    "Finished runs are in their folders; bring the database back, or correct "
                    "database.url, and start the same command again to go on."
                ) from error
            logger.warning("the database cannot be reached, next try in %.1f s: %s", pause, reason)
        _sleep(pause, stop)
        pause = min(2 * pause, LONGEST_PAUSE_S)


def _outage(error: Exception) -> str | None:
    """The driver's words when `error` is about the connection; None when it is about the data."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    if not isinstance(cause, DBAPIError) or cause.orig is None:
        return None
    # By its name: sqlite3's, psycopg's and other drivers' classes are unrelated. An
    # OperationalError is what they raise for a refused, lost or locked database.
    if cause.connection_invalidated or type(cause.orig).__mro__[0].__name__ in _OUTAGES:
        return " ".join(str(cause.orig).split())
    return "the connection was lost" if type(cause).__name__ in _OUTAGES else None


_OUTAGES = ("OperationalError", "InterfaceError", "AdminShutdown")


def _sleep(seconds: float, stop: Stop | None) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if stop is not None and stop.value:
            raise StudyStopped("stopped by a signal while the database could not be reached.")
        time.sleep(min(0.25, seconds))


def connect(url: str, database: DatabaseSettings, out: Path) -> RDBStorage:
    """Optuna's storage behind `url`, its tables made where they are missing.

    `out` is the output folder, for a lock: of two workers that make the tables at once, one would
    fail. Raises ConfigError for a URL that is none or whose driver is not installed.
    """
    try:
        backend = make_url(url).get_backend_name()
        timeout = {"sqlite": {"timeout": 60}, "postgresql": {"connect_timeout": 10}}
        with warnings.catch_warnings(), claim(out / "claims" / "tables", wait=True):
            warnings.simplefilter("ignore", ExperimentalWarning)  # heartbeats
            storage = RDBStorage(
                url,
                engine_kwargs={"connect_args": timeout.get(backend, {})},
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
    # One at a time, so that the first one's identity stands when the next one looks.
    with claim(out / "claims" / "study", wait=True), _quiet():
        study = optuna.create_study(
            storage=storage, study_name=name, direction="minimize", load_if_exists=True
        )
        if "identity" not in study.user_attrs:
            if (out / TRIALS_FOLDER).exists():
                raise ConfigError(
                    f"{out / TRIALS_FOLDER} has the runs of another search, or of one that is no "
                    "longer in its database; this one would take them for its own. Give another "
                    "--out, or remove that folder."
                )
            if first is not None:
                study.enqueue_trial(dict(first), skip_if_exists=True)
            study.set_user_attr("folder", _mark(out))
            study.set_user_attr("text", dict(text or {}))
            study.set_user_attr("identity", _as_read_back(identity))
        check_identity(study, identity, text=text)
        if study.user_attrs["folder"] != _marked(out):
            raise ConfigError(
                f"the study {name!r} was started with another output folder than {out}. Its "
                "workers share one folder, which all of them must see: runs, logs and locks are "
                "in it. Give that folder, or this search another name and a new folder."
            )
        _note_code(study)
    return study


def check_identity(
    study: optuna.Study, identity: Mapping[str, Any], *, text: Mapping[str, str] | None = None
) -> None:
    """Raise ConfigError, with the differences, for a study whose values mean something else."""
    kept = study.user_attrs
    found = list(differences(kept.get("identity", {}), _as_read_back(identity)))
    if found := [*found, *text_differences(kept.get("text", {}), text or {})]:
        raise ConfigError(
            f"the study {study.study_name!r} is another search than these settings: "
            f"{'; '.join(found)}. Give this one another --out (and another name where they share a "
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
    now, known = code_version(), study.user_attrs.get("code", [])
    if now not in known:
        if known:
            logger.warning(
                "this study was begun with version %s; this is %s, which may propose other points",
                known[0],
                now,
            )
        study.set_user_attr("code", [*known, now])


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


@contextmanager
def heartbeat(storage: RDBStorage, trial_id: int) -> Iterator[None]:
    """Inside, a thread writes signs of life for a trial; while the database is away, none."""
    over = Event()

    def beat() -> None:
        while True:
            try:
                storage.record_heartbeat(trial_id)
            except (SQLAlchemyError, StorageInternalError) as error:
                logger.warning("no sign of life could be written: %s", _outage(error) or error)
            if over.wait(storage.get_heartbeat_interval()):
                storage.remove_session()
                return

    thread = Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
