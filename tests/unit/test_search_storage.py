"""The study's database: refused when it holds another search, waited for when it is away."""

from __future__ import annotations

import logging
import shutil
import sqlite3
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("optuna")

from search_samples import objective
from sqlalchemy.exc import IntegrityError, OperationalError

from megatron_completedp.errors import ConfigError
from megatron_completedp.search import outage as outages
from megatron_completedp.search import storage
from megatron_completedp.search.outage import DatabaseUnreachable, persist
from megatron_completedp.search.settings import DatabaseSettings
from megatron_completedp.search.storage import connect, load_study, open_study
from megatron_completedp.study.crew import StudyStopped
from tests import postgres

DATABASE = DatabaseSettings()


def opened(out: Path, **changes: Any) -> Any:
    """The study `study` of a search with these settings."""
    out.mkdir(exist_ok=True)
    found = connect(f"sqlite:///{out / 'study.db'}", DATABASE, out)
    return open_study(found, "study", out, identity=objective(out, **changes).identity)


def test_the_same_search_is_taken_up_again(tmp_path: Path) -> None:
    opened(tmp_path)
    # How much is trained, and by whom, does not change what a value means.
    assert opened(tmp_path, trials=50, workers=7, retries=0).study_name == "study"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"level": "types"}, r"space\.level was global, is now types"),
        ({"bounds": {"lr": [-1, 1]}}, r"space\.bounds\.hyperparams\.lr was .* is now \[-1\.0, 1"),
        ({"seeds": 2}, "seeds was 1, is now 2"),
    ],
)
def test_another_search_under_one_name_is_refused_with_the_difference(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    opened(tmp_path)
    with pytest.raises(ConfigError, match=named):
        opened(tmp_path, **changes)


def test_a_search_does_not_go_on_over_another_text(tmp_path: Path) -> None:
    identity = objective(tmp_path).identity
    found = connect(f"sqlite:///{tmp_path / 'study.db'}", DATABASE, tmp_path)
    open_study(found, "study", tmp_path, identity=identity, text={"data/valid": "a" * 64})
    open_study(found, "study", tmp_path, identity=identity, text={})
    with pytest.raises(ConfigError, match=r"text data/valid was aaaa.*, is now bbbb"):
        open_study(found, "study", tmp_path, identity=identity, text={"data/valid": "b" * 64})


def test_a_new_study_does_not_take_the_trials_of_another(tmp_path: Path) -> None:
    """Its trials would find finished runs in their folders, of other hyperparameters."""
    opened(tmp_path)
    (tmp_path / "trials").mkdir()
    opened(tmp_path)  # its own
    found = connect(f"sqlite:///{tmp_path / 'study.db'}", DATABASE, tmp_path)
    with pytest.raises(ConfigError, match=r"trials has the runs of another .* another --out"):
        open_study(found, "two", tmp_path, identity=objective(tmp_path).identity)
    found.remove_session()
    (tmp_path / "study.db").unlink()
    with pytest.raises(ConfigError, match="no longer in its database"):
        opened(tmp_path)


def test_workers_with_another_folder_are_refused(tmp_path: Path) -> None:
    """Two folders would be two sets of locks: both would train the same trial."""
    here, there = tmp_path / "here", tmp_path / "there"
    opened(here)
    there.mkdir()
    shutil.copy(here / "study.db", there)
    with pytest.raises(ConfigError, match="another output folder"):
        opened(there)
    # A folder that was moved as a whole is the same.
    shutil.copy(here / "study.json", there)
    opened(there)


def test_another_search_in_another_folder_is_told_what_differs(tmp_path: Path) -> None:
    """Two users of one database who both left the default name."""
    url = f"sqlite:///{tmp_path / 'study.db'}"

    def opens(name: str, **changes: Any) -> None:
        out = tmp_path / name
        out.mkdir()
        identity = objective(out, **changes).identity
        open_study(connect(url, DATABASE, out), "study", out, identity=identity)

    opens("mine")
    with pytest.raises(ConfigError, match=r"space\.level was global, is now types"):
        opens("theirs", level="types")


def test_of_two_searches_that_begin_at_once_the_database_lets_one_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One name and database, two folders: the second looks before the first has written."""
    url, mark = f"sqlite:///{tmp_path / 'study.db'}", storage._mark

    def opens(name: str) -> Any:
        out = tmp_path / name
        out.mkdir()
        identity = objective(out).identity
        return open_study(connect(url, DATABASE, out), "study", out, identity=identity)

    def first_in_between(out: Path) -> str:
        monkeypatch.undo()
        opens("first")
        return mark(out)

    monkeypatch.setattr(storage, "_mark", first_in_between)
    with pytest.raises(ConfigError, match=r"another output folder than .*second"):
        opens("second")
    kept = load_study(connect(url, DATABASE, tmp_path), "study").user_attrs
    assert kept["folder"] == storage._marked(tmp_path / "first")


@pytest.mark.parametrize("written", [(), ("folder",)])
def test_a_start_that_was_killed_half_way_is_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: tuple[str, ...]
) -> None:
    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "_as_read_back" if written else "write_study_once", dies)
    with pytest.raises(KeyboardInterrupt):
        opened(tmp_path)
    monkeypatch.undo()
    assert "identity" in opened(tmp_path).user_attrs


def test_a_study_that_does_not_exist_is_named(tmp_path: Path) -> None:
    opened(tmp_path)
    with pytest.raises(ConfigError, match=r"no study 'other' .* it has study"):
        load_study(connect(f"sqlite:///{tmp_path / 'study.db'}", DATABASE, tmp_path), "other")


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("nonsense", "Expected SQLAlchemy's form"),
        ("nonsense://host/name", "Expected SQLAlchemy's form"),
        ("mysql+pymysql://user:secret@host/name", "driver is not installed"),
        ("postgres://user:secret@host/name", "Expected SQLAlchemy's form"),
        ("postgresql+psycopg//user:secret@host/name", "Expected SQLAlchemy's form"),
        ("postgresql+psycopg://user:secret@host:port/name", "Expected SQLAlchemy's form"),
        ("postgres://host/name?user=me&password=secret", "Expected SQLAlchemy's form"),
    ],
)
def test_a_bad_url_is_refused(url: str, named: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=named) as error:
        connect(url, DATABASE, tmp_path)
    assert "secret" not in "".join(traceback.format_exception(error.value))


@pytest.mark.parametrize(
    ("url", "given"),
    [
        ("sqlite:///study.db", {"timeout"}),
        ("postgresql+psycopg://host/name", {"connect_timeout", "keepalives_idle"}),
        ("postgresql+psycopg2://host/name", {"connect_timeout", "keepalives_idle"}),
        ("postgresql+pg8000://host/name", set()),
    ],
)
def test_a_driver_gets_only_what_it_knows(
    url: str, given: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pg8000 does not know libpq's names: it ended in a TypeError."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(storage, "RDBStorage", lambda url, **options: seen.update(options))
    connect(url, DATABASE, tmp_path)
    arguments = seen["engine_kwargs"]["connect_args"]
    assert given <= set(arguments)
    assert bool(given) == bool(arguments)


class Away:
    """A database that answers from the third call on."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.calls: list[float] = []

    def __call__(self) -> str:
        self.calls.append(time.monotonic())
        if len(self.calls) <= 3:
            raise self.error
        return "answer"


def outage() -> OperationalError:
    return OperationalError("SELECT 1", {}, sqlite3.OperationalError("it is away"))


def test_a_database_that_is_away_is_asked_again_less_and_less_often(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(outages, "FIRST_PAUSE_S", 0.02)
    away = Away(outage())
    with caplog.at_level(logging.WARNING):
        assert persist(away, DATABASE) == "answer"
    pauses = [after - before for before, after in zip(away.calls, away.calls[1:], strict=False)]
    # 0.02, 0.04 and 0.08 s at least; a busy machine makes them longer.
    assert pauses[0] >= 0.02
    assert pauses[1] >= 0.04
    assert pauses[2] >= 0.08
    assert caplog.text.count("it is away") == 3


def test_a_database_that_stays_away_ends_in_a_clear_error() -> None:
    with pytest.raises(DatabaseUnreachable, match=r"for 0 s: it is away.*Finished runs are in"):
        persist(Away(outage()), DatabaseSettings(retry_s=0))


def test_a_signal_ends_the_wait_for_the_database() -> None:
    with pytest.raises(StudyStopped):
        persist(Away(outage()), DATABASE, SimpleNamespace(value=True))


def test_an_error_about_the_data_is_not_tried_again() -> None:
    away = Away(IntegrityError("INSERT", {}, sqlite3.IntegrityError("not unique")))
    with pytest.raises(IntegrityError):
        persist(away, DATABASE)
    assert len(away.calls) == 1


def test_a_server_that_is_not_there_is_an_outage_and_keeps_the_password(
    tmp_path: Path,
) -> None:
    pytest.importorskip("psycopg")
    # Port 1 is reserved; nothing listens there.
    url = "postgresql+psycopg://user:secret@127.0.0.1:1/name"
    with pytest.raises(DatabaseUnreachable, match="onnection") as error:
        persist(lambda: connect(url, DATABASE, tmp_path), DatabaseSettings(retry_s=0))
    assert "secret" not in str(error.value)


def test_what_no_waiting_mends_is_said_at_once(tmp_path: Path) -> None:
    waits = DatabaseSettings(retry_s=1000, grace_s=2000)
    start = time.monotonic()
    with pytest.raises(ConfigError, match="refuses: unable to open database file"):
        persist(lambda: connect(f"sqlite:///{tmp_path}/none/a.db", waits, tmp_path), waits)
    with postgres.server() as server:
        url = server.database()
        connect(url, waits, tmp_path)
        address, _, _ = url.rpartition("/")
        with pytest.raises(ConfigError, match=r'refuses: .*"another" does not exist'):
            persist(lambda: connect(f"{address}/another", waits, tmp_path), waits)
        nobody = f"postgresql+psycopg://nobody:secret@{url.partition('@')[2]}"
        with pytest.raises(ConfigError, match=r'refuses: .*"nobody" does not exist') as error:
            persist(lambda: connect(nobody, waits, tmp_path), waits)
        assert "secret" not in str(error.value)
    assert time.monotonic() - start < 500


def test_a_server_that_restarts_is_waited_for(tmp_path: Path) -> None:
    with postgres.server() as server:
        found = connect(server.database(), DATABASE, tmp_path)
        persist(found.get_all_studies, DATABASE)
        server.stop()
        # The connection of before is dead, and there is nobody to make another.
        with pytest.raises(DatabaseUnreachable):
            persist(found.get_all_studies, DatabaseSettings(retry_s=0))
        server.start()
        assert persist(found.get_all_studies, DATABASE) == []
