"""What a worker says before it begins."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")

from search_samples import settings

from megatron_completedp.search import worker
from megatron_completedp.search.access import Search

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
