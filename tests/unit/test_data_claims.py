"""Locks that die with their holder: one holder at a time, and none after a kill."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from megatron_completedp.data import claims
from megatron_completedp.data.claims import claim
from megatron_completedp.errors import DataError

SPAWN = multiprocessing.get_context("spawn")


def hold(path: Path, connection: Connection) -> None:
    """Hold `path` until the other end closes; send what happened and when."""
    with claim(path, wait=True) as ours:
        connection.send((ours, time.monotonic()))
        connection.poll(60)


def holder(path: Path) -> tuple[multiprocessing.process.BaseProcess, Connection]:
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=hold, args=(path, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def test_one_holder_until_it_lets_go(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "shard.lock"
    process, connection = holder(path)
    assert connection.recv()[0]
    with claim(path, wait=False) as ours:
        assert not ours
    assert path.exists(), "who did not get it does not remove it"
    connection.close()
    process.join()
    assert not path.exists()
    with claim(path, wait=False) as ours:
        assert ours


def test_a_kill_frees_it_for_whoever_waits(tmp_path: Path) -> None:
    path = tmp_path / "shard.lock"
    first, first_says = holder(path)
    assert first_says.recv()[0]
    second, second_says = holder(path)
    assert not second_says.poll(1.0), "it was had twice"
    killed_at = time.monotonic()
    os.kill(first.pid or 0, signal.SIGKILL)
    assert second_says.poll(60)
    ours, since = second_says.recv()
    assert ours
    # CLOCK_MONOTONIC is the machine's, so two processes' readings compare.
    assert since > killed_at
    second_says.close()
    second.join()


def test_an_error_inside_frees_it(tmp_path: Path) -> None:
    path = tmp_path / "shard.lock"
    with pytest.raises(ValueError, match="inside"), claim(path, wait=False):
        raise ValueError("inside")
    assert not path.exists()


def test_a_lock_whose_file_was_removed_is_not_taken_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between open and lock its holder may finish and remove it, and another make it anew."""
    path, flock = tmp_path / "shard.lock", claims.fcntl.flock
    calls = []

    def removed_just_before(stream: object, how: int) -> None:
        if not calls:
            path.unlink()
        calls.append(how)
        flock(stream, how)  # type: ignore[arg-type]

    monkeypatch.setattr(claims.fcntl, "flock", removed_just_before)
    with claim(path, wait=False) as ours:
        assert ours
        assert path.exists(), "others could not see this lock"
    assert len(calls) == 2


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(stream: object, how: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(claims.fcntl, "flock", refuse)
    with pytest.raises(DataError, match="cannot be locked"), claim(tmp_path / "a.lock", wait=True):
        pass
