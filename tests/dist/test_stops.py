"""Signals and hangs under torchrun: what one rank learns, all ranks act on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

from megatron_completedp.data.jsonl import read_whole_rows
from tests.mcore.train_runs import ROOT, finish, losses, make_corpus, start, write_run

TP2 = ("--tensor-model-parallel-size", "2")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    code, log = finish(start(write_run(folder, corpus), *TP2, ranks=2))
    assert code == 0, log
    return folder


def ranks_of(torchrun: int) -> dict[int, int]:
    """Process ids of the ranks that `torchrun` has started."""
    children = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()
    ranks = {}
    for child in map(int, children):
        for variable in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            if variable.startswith(b"RANK="):
                ranks[int(variable[5:])] = child
    return ranks


def wait_for_a_step(folder: Path, timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while not losses(folder):
        assert time.monotonic() < deadline, f"{folder} has no step after {timeout_s} s"
        time.sleep(0.005)


def assert_stopped_and_resumes_like(folder: Path, config: Path, undisturbed: Path) -> None:
    step = losses(folder)[-1][0]
    event = read_whole_rows(folder / "metrics.jsonl")[-1]
    assert (event["step"], event["what"], event["policy"]) == (step, "stop", "requeue")
    assert (folder / "requeue").read_text() == f"{event['message']}\n"
    assert (folder / "checkpoints" / f"step_{step:08d}").is_dir()
    code, log = finish(start(config, *TP2, ranks=2))
    assert code == 0, log
    assert f"at step {step}" in log
    assert not (folder / "requeue").exists()
    # The same two ranks sum in the same order: equal to the last bit.
    assert losses(folder) == losses(undisturbed)
    assert losses(folder, "eval") == losses(undisturbed, "eval")


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all(corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Rank 1 of a TP pair: it shares no loss with rank 0, only the sum over all ranks."""
    folder = tmp_path / "run"
    config = write_run(folder, corpus)
    process = start(config, *TP2, ranks=2)
    wait_for_a_step(folder)
    os.kill(ranks_of(process.pid)[1], signal.SIGTERM)
    code, log = finish(process)
    assert code == 1, "torchrun's own code, which is why there is a file"
    # Once one rank has left, torchrun ends the other, which has nothing left to do.
    assert "exitcode  : 75" in log, log
    assert_stopped_and_resumes_like(folder, config, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["SIGTERM", "SIGUSR1"])
def test_torchrun_passes_the_signal_on(
    corpus: Path, undisturbed: Path, tmp_path: Path, number: signal.Signals
) -> None:
    folder = tmp_path / "run"
    config = write_run(folder, corpus)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"]
    command += ["-m", "megatron_completedp.train", "--config", str(config), *TP2]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for_a_step(folder)
    process.send_signal(number)
    code, log = finish(process)
    assert code == 1, log
    assert_stopped_and_resumes_like(folder, config, undisturbed)


@pytest.mark.slow
def test_a_hung_rank_ends_the_job_with_the_stacks_of_all(corpus: Path, tmp_path: Path) -> None:
    folder, timeout_s = tmp_path / "run", 6
    config = write_run(folder, corpus, training__timeout_s=timeout_s)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "-m", "tests.dist.hanging_rank", "--config", str(config)]
    process = subprocess.Popen([*command, *TP2], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for_a_step(folder)
    began = time.monotonic()
    code, log = finish(process)
    # The timeout, 5 s for the others' stacks, and a few for torchrun on a busy machine.
    assert timeout_s <= time.monotonic() - began < timeout_s + 20
    assert code == 1, log
    stacks = [(folder / f"stacks_rank{rank}.txt").read_text() for rank in range(2)]
    for rank, text in enumerate(stacks):
        assert f"rank {rank} has finished nothing since step 3, for {timeout_s} s" in text
        assert f"error: rank {rank} has finished nothing" in log
    # Rank 1 is inside the step, in a collective; rank 0 never entered it.
    assert "in _forward_step" in stacks[1]
    assert "in _forward_step" not in stacks[0]
    assert "in hang_on_rank_zero" in stacks[0]
