"""How the end of a worker reaches whoever started it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_completedp.errors import CompletedPError
from megatron_completedp.study.crew import Crew, Stop, StudyStopped, worker_count


def stopped_while_waiting(*, number: int, stop: Stop) -> None:
    """A signal came while the worker waited for its database."""
    stop.value = True
    raise StudyStopped("stopped by a signal while the database could not be reached.")


def failing(*, number: int, stop: Stop) -> None:
    raise CompletedPError("no data")


def writes_its_place(*, number: int, stop: Stop) -> None:
    """Its cores, threads and devices into the file of its log's name, in the current folder."""
    place = {
        "cores": sorted(os.sched_getaffinity(0)),
        "threads": os.environ["OMP_NUM_THREADS"],
        "devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }
    Path(f"place{number}.json").write_text(json.dumps(place))


def waits_for_the_end(*, number: int, stop: Stop) -> None:
    """Into the current folder, what it has seen."""
    Path("began").write_text("yes")
    deadline = time.monotonic() + 60
    while not stop.value and time.monotonic() < deadline:
        time.sleep(0.02)
    Path("ended").write_text(str(stop.value))


def places(crew: Crew) -> list[dict[str, Any]]:
    crew.run(lambda: False)
    return [json.loads(Path(f"place{i}.json").read_text()) for i in range(crew.workers)]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core has nothing to share")
def test_every_worker_has_its_own_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    every = sorted(os.sched_getaffinity(0))
    first, second = places(Crew(work=writes_its_place, logs=tmp_path, workers=2, ranks=1))
    half = len(every) // 2
    assert (first["cores"], second["cores"]) == (every[:half], every[half:])
    assert first["threads"] == second["threads"] == "1"
    assert first["devices"] is None
    # Of more workers than cores, none can have its own.
    crew = Crew(work=writes_its_place, logs=tmp_path, workers=2, ranks=len(every))
    assert [place["cores"] for place in places(crew)] == [every, every]


def test_every_worker_has_its_own_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    devices = ("4", "5", "6", "7")
    crew = Crew(work=writes_its_place, logs=tmp_path, workers=2, ranks=2, devices=devices)
    assert [place["devices"] for place in places(crew)] == ["4,5", "6,7"]
    assert all(place["cores"] == sorted(os.sched_getaffinity(0)) for place in places(crew))


@pytest.mark.parametrize(
    ("workers", "ranks", "devices", "expected"),
    [(3, 1, (), 3), (0, 2, ("0", "1", "2", "3", "4"), 2), (0, 8, ("0",), 1)],
)
def test_a_crew_is_as_large_as_its_devices(
    workers: int, ranks: int, devices: tuple[str, ...], expected: int
) -> None:
    assert worker_count(workers, ranks=ranks, devices=devices) == expected


def test_a_stop_is_a_stop_and_an_error_an_error(tmp_path: Path) -> None:
    with pytest.raises(StudyStopped, match="start the same command again"):
        Crew(work=stopped_while_waiting, logs=tmp_path, workers=1, ranks=1).run(lambda: False)
    with pytest.raises(CompletedPError, match="no data") as error:
        Crew(work=failing, logs=tmp_path, workers=1, ranks=1).run(lambda: False)
    assert not isinstance(error.value, StudyStopped)


def test_a_worker_stops_when_its_parent_is_killed(tmp_path: Path) -> None:
    """Else it would train on, beside the workers of the command that is started again."""
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_study_crew import Crew, waits_for_the_end
Crew(work=waits_for_the_end, logs=Path("logs"), workers=1, ranks=1).run(lambda: False)
"""
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path)
    try:
        wait_for(tmp_path / "began")
    finally:
        parent.kill()
        parent.wait()
    wait_for(tmp_path / "ended")
    assert (tmp_path / "ended").read_text() == "True"


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 90
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < deadline, f"no {file.name}"
        time.sleep(0.05)
