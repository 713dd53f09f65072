"""A database that was away for longer than the grace period: whose worker lives loses no trial."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("optuna")

from optuna.storages._rdb.models import TrialHeartbeatModel
from optuna.trial import FrozenTrial
from search_samples import facts, queue, settings
from sqlalchemy import update
from test_search_storage import outage

from megatron_completedp.search import outage as outages
from megatron_completedp.search.access import Search
from megatron_completedp.search.objective import Facts, Objective
from megatron_completedp.search.outage import heartbeat
from megatron_completedp.search.queue import Queue
from megatron_completedp.search.settings import DatabaseSettings
from megatron_completedp.search.worker import _train

DATABASE = DatabaseSettings(heartbeat_s=2, grace_s=4, retry_s=0)


def until(holds: Callable[[], bool], seconds: float) -> bool:
    """Whether it held within `seconds`."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def test_a_sign_of_life_is_tried_again_soon(caplog: pytest.LogCaptureFixture) -> None:
    """With a minute between heartbeats, the trial would look lost for that long."""
    tries: list[float] = []

    def record_heartbeat(trial_id: int) -> None:
        tries.append(time.monotonic())
        if len(tries) <= 2:
            raise outage()

    storage: Any = SimpleNamespace(
        record_heartbeat=record_heartbeat,
        get_heartbeat_interval=lambda: 3600,
        remove_session=lambda: None,
    )
    with heartbeat(storage, 0):
        assert until(lambda: len(tries) == 3, seconds=60)
        time.sleep(1.5)
    assert len(tries) == 3, "the next after a heartbeat's time"
    assert caplog.text.count("no sign of life can be written") == 1, "once for the outage"


def test_a_search_that_prunes_waits_for_the_database_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads the trials that have ended once it has taken one."""
    monkeypatch.setattr(outages, "FIRST_PAUSE_S", 0.02)
    one = queue(tmp_path)
    search, stop = Search(settings(prune=True), tmp_path), SimpleNamespace(value=False)
    get_trials, asked = one.study.get_trials, []

    def away(*args: Any, **kwargs: Any) -> list[FrozenTrial]:
        asked.append(args)
        if len(asked) == 1:
            raise outage()
        return get_trials(*args, **kwargs)

    def train(self: Objective, params: Mapping[str, float], **run: Any) -> Facts:
        return facts(3.0)

    monkeypatch.setattr(Objective, "train", train)
    with ExitStack() as held:
        taken = one.take(held)
        assert taken is not None
        monkeypatch.setattr(one.study, "get_trials", away)
        _train(one, taken, search, stop)
    assert get_trials()[0].value == 3.0


def age_heartbeats(one: Queue) -> None:
    """As after an outage longer than the grace period."""
    with one.storage.engine.begin() as connection:
        connection.execute(update(TrialHeartbeatModel).values(heartbeat=datetime(2020, 1, 1)))


def test_a_living_worker_keeps_its_trial_over_a_long_outage(tmp_path: Path) -> None:
    mine, other = queue(tmp_path, database=DATABASE), queue(tmp_path, database=DATABASE)
    with ExitStack() as held, ExitStack() as theirs:
        taken = mine.take(held)
        assert taken is not None
        mine.storage.record_heartbeat(taken.trial._trial_id)
        age_heartbeats(mine)
        # The other asks first, before the living one wrote again.
        new = other.take(theirs)
        assert new is not None
        assert new.trial.number == 1
        mine.storage.record_heartbeat(taken.trial._trial_id)
        time.sleep(DATABASE.heartbeat_s + 0.5)
        assert not other.finished()
        mine.complete(taken, facts(3.0))
        assert mine.study.get_trials()[0].value == 3.0
