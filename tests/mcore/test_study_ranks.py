"""A study's run on several ranks: stopped when its worker is asked to, and left by all of them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread

import pytest
import yaml

from megatron_completedp.study.points import train_point
from megatron_completedp.train.folder import CHECKPOINTS, METRICS_FILE

from .train_runs import make_corpus, write_run

pytestmark = pytest.mark.slow


@pytest.fixture
def config(tmp_path: Path) -> Iterator[Path]:
    """A run of minutes, of which no rank is left behind."""
    file = write_run(tmp_path / "run", make_corpus(tmp_path / "corpus"), checkpoint__interval=0)
    tree = yaml.safe_load(file.read_text())
    tree["training"]["train_steps"] = 20_000
    file.write_text(yaml.safe_dump(tree))
    yield file
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if str(file).encode() in (process / "cmdline").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)


def children(parent: int) -> list[int]:
    found = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(pid) for pid in found]


def torchrun() -> int:
    """The process that `train_point` waits for."""
    (found,) = (
        pid
        for pid in children(os.getpid())
        if b"torch.distributed.run" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    return found


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or dead and not waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except FileNotFoundError:
        return True


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def folder_of(config: Path) -> Path:
    return Path(yaml.safe_load(config.read_text())["run_dir"])


def test_ranks_that_got_the_signal_themselves_are_waited_for(config: Path) -> None:
    """As where SLURM signals every process: a second signal ends torchrun while the ranks save."""
    metrics, ranks, asked = folder_of(config) / METRICS_FILE, [], []

    def signal_everybody() -> None:
        wait_until(lambda: metrics.exists() and '"step": 3' in metrics.read_text())
        ranks.extend(children(torchrun()))
        for rank in ranks:
            os.kill(rank, signal.SIGTERM)
        os.kill(torchrun(), signal.SIGKILL)
        asked.append(True)

    Thread(target=signal_everybody).start()
    assert train_point(config, ranks=2, stop=lambda: bool(asked)) is None
    assert len(ranks) == 2
    assert all(map(has_ended, ranks))
    assert list((folder_of(config) / CHECKPOINTS).glob("step_*"))


def test_ranks_that_are_asked_before_they_train_are_stopped_and_did_not_fail(config: Path) -> None:
    asked: list[bool] = []

    def is_to_stop() -> bool:
        if not asked and children(torchrun()):
            asked.append(True)
        return bool(asked)

    assert train_point(config, ranks=2, stop=is_to_stop) is None
    assert not (folder_of(config) / METRICS_FILE).exists()
