"""A database that is away: how long it is waited for, and signs of life meanwhile."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import TypeVar

from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError

from megatron_completedp.errors import CompletedPError, ConfigError
from megatron_completedp.search.settings import DatabaseSettings
from megatron_completedp.study.crew import Stop, StudyStopped

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: What Optuna's storage raises, for a database that is away among others.
FAILURES = (SQLAlchemyError, StorageInternalError)

#: Between two tries to reach the database, at first and at most.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0

#: Between two tries to write a sign of life that the database did not take.
NEXT_BEAT_S = 1.0


class DatabaseUnreachable(CompletedPError):
    """The study's database did not answer for as long as it is waited for."""


def persist(call: Callable[[], T], database: DatabaseSettings, stop: Stop | None = None) -> T:
    """`call()`, again and again while the database cannot be reached.

    `call` must be able to be repeated. Raises DatabaseUnreachable after `database.retry_s`,
    StudyStopped when `stop` is set while waiting, ConfigError at once for what no waiting mends,
    as a wrong password, and whatever else `call` raises.
    """
    start, pause = time.monotonic(), FIRST_PAUSE_S
    while True:
        try:
            return call()
        except FAILURES as error:
            reason = _outage(error)
            if reason is None:
                raise
            if any(words in reason for words in _REFUSALS):
                raise ConfigError(
                    f"the study's database refuses: {reason}. Correct database.url, the rights of "
                    "its user or those of the file, and start the same command again."
                ) from None
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
    # SQLAlchemy's classes, to which it maps the drivers'. An OperationalError is what they raise
    # for a refused, lost or locked database.
    if cause.connection_invalidated or isinstance(cause, OperationalError | InterfaceError):
        return " ".join(str(cause.orig).split())
    return None


#: Words of PostgreSQL and SQLite for what stays so until somebody changes it.
_REFUSALS = (
    "authentication failed",
    "does not exist",
    "no password supplied",
    "no pg_hba.conf entry",
    "readonly database",
    "unable to open database file",
)


def _sleep(seconds: float, stop: Stop | None) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if stop is not None and stop.value:
            raise StudyStopped("stopped by a signal while the database could not be reached.")
        time.sleep(min(0.25, seconds))


@contextmanager
def heartbeat(storage: RDBStorage, trial_id: int) -> Iterator[None]:
    """Inside, a thread writes signs of life for a trial; while the database is away, none.

    Once the database is back, the next comes within NEXT_BEAT_S: until then the trial looks lost.
    """
    over = Event()

    def beat() -> None:
        written = True
        while True:
            try:
                storage.record_heartbeat(trial_id)
                written = True
            except FAILURES as error:
                if written:  # once for each outage
                    logger.warning("no sign of life can be written: %s", _outage(error) or error)
                written = False
            if over.wait(storage.get_heartbeat_interval() if written else NEXT_BEAT_S):
                storage.remove_session()
                return

    thread = Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
