"""Signals to a real training process: it saves within a step, says so, and is taken up again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_completedp.config.load import load_config
from megatron_completedp.data.jsonl import read_whole_rows
from megatron_completedp.errors import REQUEUE_EXIT_CODE, DataError
from megatron_completedp.mcore.checkpoint import Saver
from megatron_completedp.mcore.engine import Engine
from megatron_completedp.mcore.parallel import destroy_parallel
from megatron_completedp.mcore.store import list_checkpoints
from megatron_completedp.plan.run_plan import Plan
from megatron_completedp.train.loop import RunResult
from megatron_completedp.train.metrics import Row
from megatron_completedp.train.start import train
from tests.mcore.train_runs import (
    INTERVAL,
    ROOT,
    STEPS,
    finish,
    losses,
    make_corpus,
    start,
    write_run,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert not train_here(write_run(folder, corpus)).stopped
    return folder


def train_here(config: Path) -> RunResult:
    destroy_parallel(keep_process_group=True)  # a new process has no groups
    return train(Plan.of(load_config(config)))


def metrics(folder: Path, kind: str) -> list[Row]:
    return [row for row in read_whole_rows(folder / "metrics.jsonl") if row["kind"] == kind]


def newest_step(folder: Path) -> int:
    return int(list_checkpoints(folder / "checkpoints")[-1].name.removeprefix("step_"))


def assert_asks_for_requeue(folder: Path, step: int) -> None:
    """The event, the file for launchers and the checkpoint all say `step`."""
    event = metrics(folder, "event")[-1]
    assert (event["step"], event["what"], event["policy"]) == (step, "stop", "requeue")
    assert (folder / "requeue").read_text() == f"{event['message']}\n"
    assert newest_step(folder) == step


def test_sigterm_saves_and_the_restart_ends_as_if_undisturbed(
    corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "stopped"
    config = write_run(folder, corpus)
    process = start(config)
    while not metrics(folder, "train"):
        time.sleep(0.005)
    seen = metrics(folder, "train")[-1]["step"]
    process.send_signal(signal.SIGTERM)
    code, log = finish(process)
    assert code == REQUEUE_EXIT_CODE, log
    step = metrics(folder, "train")[-1]["step"]
    # The step that was running when the signal came, and as much again for this test's own delay.
    assert step <= seen + 3
    assert step % INTERVAL or step == INTERVAL, "stopped for the signal, not at the usual time"
    assert_asks_for_requeue(folder, step)
    code, log = finish(start(config))
    assert code == 0, log
    assert not (folder / "requeue").exists()
    assert losses(folder) == losses(undisturbed)
    assert losses(folder, "eval") == losses(undisturbed, "eval")


@pytest.mark.parametrize("asynchronous", [False, True], ids=["foreground", "background"])
@pytest.mark.parametrize(
    ("owner", "method", "step"),
    [(Engine, "_run", 1), (Engine, "evaluate", STEPS // 2), (Saver, "save", INTERVAL + 1)],
    ids=["step", "evaluation", "save"],
)
def test_a_signal_in_the_midst(
    corpus: Path,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    method: str,
    step: int,
    asynchronous: bool,
) -> None:
    """SIGUSR1 at the start of `method` stops after `step`: this one, or the one after a save."""
    folder = tmp_path / "run"
    config = write_run(folder, corpus, checkpoint__asynchronous=asynchronous)
    original = getattr(owner, method)

    sent = []

    def signalled(*args: Any, **kwargs: Any) -> Any:
        if not sent:  # a second one, on a slow machine, would end this process
            sent.append(os.kill(os.getpid(), signal.SIGUSR1))
            time.sleep(0.1)  # it arrives while the method runs
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, signalled)
        result = train_here(config)
    assert result.stopped
    assert result.steps == step
    assert_asks_for_requeue(folder, step)
    assert not train_here(config).stopped
    assert losses(folder) == losses(undisturbed)
    assert losses(folder, "eval") == losses(undisturbed, "eval")


def test_a_start_that_fails_does_not_ask_again(corpus: Path, tmp_path: Path) -> None:
    """A launcher that looks at the file alone must not start a broken run for ever."""
    folder = tmp_path / "run"
    config = write_run(folder, corpus, data__train=["no/such/prefix"])
    folder.mkdir()
    (folder / "requeue").write_text("stopped by a signal\n")
    with pytest.raises(DataError, match=r"no/such/prefix.bin does not exist"):
        train_here(config)
    assert not (folder / "requeue").exists()


def test_a_signal_in_the_last_step_finishes_the_run(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    train_step = Engine.train_step

    def signalled(engine: Engine, *args: Any, **kwargs: Any) -> Any:
        if engine.step == STEPS - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(engine, *args, **kwargs)

    monkeypatch.setattr(Engine, "train_step", signalled)
    assert not train_here(write_run(folder, corpus)).stopped
    assert not (folder / "requeue").exists()
    assert newest_step(folder) == STEPS


#: The command, but its second checkpoint never gets its name.
STUCK_IN_SAVE = """
import sys, time
from megatron_completedp.config.cli import run_command
from megatron_completedp.mcore import checkpoint
from megatron_completedp.train.__main__ import main

seal = checkpoint.write_manifest

def stuck(folder, records):
    if checkpoint.store.list_checkpoints(folder.parent):
        print("saving", flush=True)
        time.sleep(600)
    seal(folder, records)

checkpoint.write_manifest = stuck
sys.exit(run_command(main))
"""


@pytest.mark.slow
def test_a_second_signal_in_a_save_does_no_harm(
    corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    config = write_run(folder, corpus)
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK_IN_SAVE, "--config", str(config)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "saving\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(2.5)  # signals.REPEAT_S and some
    process.send_signal(signal.SIGTERM)
    code, log = finish(process, timeout_s=10)
    assert code == 128 + signal.SIGTERM, log
    assert newest_step(folder) == INTERVAL, "the half-written one does not count"
    assert len(list((folder / "checkpoints").glob(".writing_*"))) == 1, (
        "or nothing was half-written"
    )
    assert not train_here(config).stopped
    assert losses(folder) == losses(undisturbed)


#: A loader with a worker process, as on a GPU machine. SIGTERM to the worker must not stop the
#: batches, and an exit that leaves the loader open must not wait for the worker for ever.
SIGNALLED_WORKER = """
import multiprocessing, os, signal, torch
from megatron_completedp.train.loader import Share, steps_of_batches
from megatron_completedp.train.signals import StopSignals

sample = {"tokens": torch.zeros(3), "labels": torch.zeros(3)}
share = Share(global_batch_size=2, micro_batch_size=2, dp_rank=0, dp_size=1)
with StopSignals() as stop:
    loader = steps_of_batches([sample] * 200, share, first_step=0, steps=100, workers=1)
    next(loader)
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGTERM)
    print(sum(1 for _, _ in zip(range(90), loader)), stop.received, flush=True)
    raise SystemExit(3)
"""


def test_data_workers_outlive_signals_and_not_the_run() -> None:
    command = [sys.executable, "-W", "ignore", "-c", SIGNALLED_WORKER]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=60, cwd=ROOT
    )
    assert done.returncode == 3, done.stderr
    assert done.stdout == "90 None\n"
