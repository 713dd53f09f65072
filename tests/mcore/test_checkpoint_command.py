"""Checkpoints as the training command meets them: a full disk, damage, changed hyperparameters."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_completedp.config.load import load_config
from megatron_completedp.data.jsonl import read_whole_rows
from megatron_completedp.mcore.checkpoint_info import read_table
from megatron_completedp.mcore.manifest import verify
from megatron_completedp.mcore.store import checkpoint_path, list_checkpoints
from tests.mcore.conftest import Command
from tests.mcore.damage import flip, truncate
from tests.mcore.train_runs import (
    INTERVAL,
    ROOT,
    STEPS,
    losses,
    make_corpus,
    write_run,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


#: The command on a disk that is full from the checkpoint of step 12 on: no file may grow beyond
#: 100 kB, which the shards do and the metrics do not.
FULL_DISK = """
import resource, sys
from megatron_completedp.config.cli import run_command
from megatron_completedp.mcore.checkpoint import Saver
from megatron_completedp.train.__main__ import main

save = Saver.save

def limited(saver):
    if saver._engine.step >= 12:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    return save(saver)

Saver.save = limited
sys.exit(run_command(main))
"""


@pytest.fixture(scope="module")
def stopped(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A run that a full disk has ended: its config, its folder and what it wrote to stderr."""
    folder = tmp_path_factory.mktemp("runs") / "full"
    config = write_run(folder, corpus)
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, "--config", str(config)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    return config, folder, done.stderr


def test_a_full_disk_ends_the_run_with_a_message(stopped: tuple[Path, Path, str]) -> None:
    _, folder, log = stopped
    assert "error: " in log
    assert f"{checkpoint_path(folder / 'checkpoints', 12)} could not be written (rank 0: " in log
    assert "Make room" in log
    assert "Traceback" not in log
    names = [path.name for path in (folder / "checkpoints").iterdir()]
    assert sorted(names) == ["latest", "step_00000004", "step_00000008"]
    assert losses(folder)[-1][0] == 12


@pytest.fixture
def run(stopped: tuple[Path, Path, str], tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the stopped run that may be spoilt: its config and its folder."""
    config, folder, _ = stopped
    copied = Path(shutil.copytree(folder, tmp_path / "run"))
    text = config.read_text().replace(str(folder), str(copied))
    again = tmp_path / "run.yaml"
    again.write_text(text)
    # run_dir is no part of the run's identity.
    return again, copied


def test_the_next_start_goes_on(run: tuple[Path, Path], command: Command, corpus: Path) -> None:
    config, folder = run
    assert command(config) == (0, "")
    whole = folder.with_name("whole")
    assert command(write_run(whole, corpus)) == (0, "")
    assert losses(folder) == losses(whole)
    assert [
        row for row in read_whole_rows(folder / "metrics.jsonl") if row["kind"] == "event"
    ] == []


def test_a_damaged_checkpoint_is_an_event_and_no_checkpoint_an_error(
    run: tuple[Path, Path], command: Command
) -> None:
    config, folder = run
    newest = checkpoint_path(folder / "checkpoints", 8)
    flip(newest)
    assert command(config, "--checkpoint.keep-last", "9") == (0, "")
    events = [row for row in read_whole_rows(folder / "metrics.jsonl") if row["kind"] == "event"]
    (event,) = events
    assert (event["step"], event["what"]) == (4, "resume")
    assert event["message"].startswith("skipped step_00000008: ")
    assert [step for step, _ in losses(folder)] == list(range(1, STEPS + 1))
    verify(newest)  # written again
    for path in list_checkpoints(folder / "checkpoints"):
        truncate(path)
    before = (folder / "metrics.jsonl").read_bytes()
    code, message = command(config)
    assert code == 1
    assert f"none of the {STEPS // INTERVAL} checkpoints in" in message
    assert "move the folder away to start the run afresh" in message
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_the_command_changes_hyperparameters_only_by_name(
    run: tuple[Path, Path], command: Command
) -> None:
    config, folder = run
    before = (folder / "config.yaml").read_bytes()
    change = ["--hyperparams.eps", "1e-7", "--hyperparams.beta1", "0.8"]
    code, message = command(config, *change)
    assert code == 2
    assert "already holds another run" in message
    code, message = command(config, *change, "--allow-hp-change", "*.eps")
    assert code == 1
    assert "--allow-hp-change embedding.beta1" in message
    assert (folder / "config.yaml").read_bytes() == before, "a refused change changes nothing"
    allow = ["--allow-hp-change", "*.eps", "--allow-hp-change", "*.beta1"]
    assert command(config, *change, *allow) == (0, "")
    assert (folder / "config.1.yaml").read_bytes() == before
    assert load_config(folder / "config.yaml").hyperparams.beta1 == 0.8
    events = [row for row in read_whole_rows(folder / "metrics.jsonl") if row["kind"] == "event"]
    assert events[0]["message"].startswith("hyperparameters changed on request:\nmodule")
    assert read_table(checkpoint_path(folder / "checkpoints", STEPS))["modules"][0]["beta1"] == 0.8
