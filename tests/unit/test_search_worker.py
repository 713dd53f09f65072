"""What a worker says before it begins, and which trial is its last."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")

from search_samples import facts, objective, queue, settings

from megatron_completedp.search import worker
from megatron_completedp.search.access import Search
from megatron_completedp.search.objective import Facts, Objective
from megatron_completedp.study.crew import StudyStopped
from megatron_completedp.train.signals import StopSignals

POSTGRES = {"url": "postgresql+psycopg://user:secret@host/name"}


@pytest.mark.parametrize(
    ("tasks", "database", "warns"),
    [
        ("2", {}, True),
        ("2", {"url": "sqlite:////shared/study.db"}, True),
        ("2", POSTGRES, False),
        ("1", {}, False),
        (None, {}, False),
    ],
)
def test_tasks_of_an_array_are_warned_of_sqlite(
    tasks: str | None,
    database: dict[str, Any],
    warns: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.delenv("SLURM_ARRAY_TASK_COUNT", raising=False)
    if tasks is not None:
        monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", tasks)
    monkeypatch.setattr(worker, "_work", lambda *_: None)
    with caplog.at_level(logging.WARNING):
        worker.work(Search(settings(database=database), tmp_path))
    assert ("machines need database.url: postgresql+psycopg://" in caplog.text) == warns


@pytest.mark.parametrize(("stopped_in", "trials"), [(None, 3), ("0001", 2)])
def test_no_trial_follows_one_that_a_signal_found_in_its_last_step(
    stopped_in: str | None, trials: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = queue(tmp_path, trials=3)

    def train(self: Objective, params: Mapping[str, float], *, name: str, **_: Any) -> Facts:
        with StopSignals() as signals:
            if name == stopped_in:
                os.kill(os.getpid(), signal.SIGTERM)
                while not signals.requested():
                    time.sleep(0.01)
        return facts(3.0)

    monkeypatch.setattr(Search, "join", lambda *_: one)
    monkeypatch.setattr(Objective, "train", train)
    search = Search(settings(), tmp_path)
    if stopped_in is None:
        worker.work(search)
    else:
        with pytest.raises(StudyStopped, match="start the same command again"):
            worker.work(search)
    states = [trial.state.name for trial in one.study.get_trials(deepcopy=False)]
    assert states == ["COMPLETE"] * trials


def test_a_signal_while_the_search_is_joined_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would be lost between two handlers, and the whole search begin."""
    one = queue(tmp_path, trials=3)

    def join(*_: object) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return one

    monkeypatch.setattr(Search, "join", join)
    with pytest.raises(StudyStopped, match="start the same command again"):
        worker.run(Search(settings(), tmp_path))
    assert one.study.get_trials() == []


def test_a_trial_of_several_seeds_begins_no_run_once_it_is_asked_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Path] = []

    def train_point(config_file: Path, **_: object) -> dict[str, object]:
        begun.append(config_file)
        return {"loss": 3.0, "diverged": False}

    monkeypatch.setattr("megatron_completedp.search.objective.train_point", train_point)
    runs = objective(tmp_path, seeds=3)
    (tmp_path / "trials").mkdir()
    found = runs.train({}, name="0000", replicate=0, stop=lambda: len(begun) == 2)
    assert len(begun) == 2
    assert not isinstance(found, Facts)
    begun.clear()
    assert isinstance(runs.train({}, name="0000", replicate=0, stop=lambda: False), Facts)
    assert len(begun) == 3
