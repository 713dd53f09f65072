"""Training through launch/slurm.sbatch on a real controller, undisturbed and not."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

from megatron_completedp.launch.attempts import Attempts, newest_step
from tests.mcore.train_runs import ROOT, finish, losses, make_corpus, start, write_run
from tests.slurm.cluster import Cluster, cluster, wait_until

#: So many steps that a run is still at it when a test has seen it begin; seconds on an idle core.
LONG = {"training__train_steps": 400, "checkpoint__interval": 20, "evaluation__interval": 200}
#: For what takes seconds on an idle machine.
TIMEOUT_S = 600

pytestmark = [pytest.mark.slow, pytest.mark.slurm]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes, of which the runs take two."""
    with cluster(tmp_path_factory.mktemp("slurm"), nodes=3, cpus=2) as found:
        yield found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The long run on two ranks of torchrun alone."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    code, log = finish(start(write_run(folder, corpus, **LONG), ranks=2), timeout_s=TIMEOUT_S)
    assert code == 0, log
    return folder


def submit(slurm: Cluster, config: Path, *flags: str) -> str:
    """Queue the run on two nodes with the command; the job's number."""
    command = [sys.executable, "-m", "megatron_completedp.launch", "train", "--config", str(config)]
    output = slurm.run(*command, "--nodes", "2", *flags, cwd=ROOT)
    return output.rpartition("job  ")[2].split(";")[0].strip()


def wait_for_a_checkpoint(folder: Path, *, after: int = 0) -> None:
    wait_until(
        f"a checkpoint after step {after}",
        lambda: newest_step(folder) > after,
        timeout_s=TIMEOUT_S,
    )


def wait_for_the_end(slurm: Cluster, job: str) -> None:
    wait_until(f"the end of job {job}", lambda: job not in slurm.jobs(), timeout_s=TIMEOUT_S)


def outcomes(folder: Path) -> list[tuple[str, str]]:
    """How each start ended, and on which nodes it was."""
    return [(each.outcome, ",".join(each.nodes)) for each in Attempts(folder).all]


def assert_like(undisturbed: Path, folder: Path) -> None:
    """Two ranks sum in one order, so the losses are equal to the last bit."""
    assert losses(folder) == losses(undisturbed), job_log(folder)
    assert losses(folder, "eval") == losses(undisturbed, "eval")


def job_log(folder: Path) -> str:
    return "".join(path.read_text() for path in (folder / "launch").glob("job-*.log"))


def rank_process(job: str, rank: int) -> int:
    """The process id of a job's rank; 0 while there is none."""
    wanted = {f"RANK={rank}".encode(), f"SLURM_JOB_ID={job}".encode()}
    for entry in Path("/proc").iterdir():
        try:
            environment = set((entry / "environ").read_bytes().split(b"\0"))
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if wanted <= environment and b"megatron_completedp.train" in words:
            return int(entry.name)
    return 0


def test_a_run_on_two_nodes(
    slurm: Cluster, corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    wait_for_the_end(slurm, submit(slurm, write_run(folder, corpus, **LONG)))
    assert outcomes(folder) == [("finished", "n1,n2")], job_log(folder)
    assert_like(undisturbed, folder)
    logs = Attempts(folder).logs()
    assert "2 ranks" in (logs / "rank_0.log").read_text()
    assert (logs / "rank_1.log").exists()
    shown = slurm.run(sys.executable, "-m", "megatron_completedp.launch", "status", str(folder))
    assert "step 400 of 400 (100.0%)" in shown
    assert "none in the queue" in shown


def test_a_preempted_run_ends_with_the_same_losses(
    slurm: Cluster, corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    job = submit(slurm, write_run(folder, corpus, **LONG))
    wait_for_a_checkpoint(folder)
    urgent = slurm.run(
        "sbatch", "--parsable", "--partition=high", "--nodes=3", "--exclusive",
        f"--output={tmp_path}/urgent.log", "--wrap=scontrol show hostnames; sleep 2",
    )  # fmt: skip
    wait_for_the_end(slurm, urgent)
    assert (tmp_path / "urgent.log").read_text() == "n1\nn2\nn3\n"
    wait_for_the_end(slurm, job)
    first, second = Attempts(folder).all
    assert (first.outcome, second.outcome) == ("stopped", "finished"), job_log(folder)
    # It lost not a step: it was saved when the signal came, and not at the usual interval.
    assert second.began_step == first.ended_step
    assert f"at step {second.began_step}" in (Attempts(folder).logs() / "rank_0.log").read_text()
    assert_like(undisturbed, folder)


def test_a_node_whose_rank_is_killed_twice_is_left_out(
    slurm: Cluster, corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    job = submit(slurm, write_run(folder, corpus, **LONG))
    for _ in range(2):
        wait_for_a_checkpoint(folder, after=newest_step(folder))
        os.kill(rank_process(job, 0), signal.SIGKILL)
        killed = len(Attempts(folder).all)
        wait_until("the next start", lambda: len(Attempts(folder).all) > killed, timeout_s=300)  # noqa: B023
    wait_for_the_end(slurm, job)
    expected = [("failed", "n1,n2"), ("failed", "n1,n2"), ("finished", "n2,n3")]
    assert outcomes(folder) == expected, job_log(folder)
    first = Attempts(folder).all[0]
    assert (first.blamed, first.reason) == ("n1", "rank 0 on n1 was ended by SIGKILL")
    assert "without n1, which failed twice" in job_log(folder)
    assert_like(undisturbed, folder)


def test_a_run_that_cannot_progress_stops_and_says_why(
    slurm: Cluster, corpus: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    config = write_run(folder, corpus, data__train=["no/such/prefix"])
    wait_for_the_end(slurm, submit(slurm, config, "--tries", "2"))
    assert [outcome for outcome, _ in outcomes(folder)] == ["failed", "failed"]
    message = job_log(folder)
    assert "2 starts of job" in message
    assert "newest: none was ever written" in message
    assert "no/such/prefix.bin does not exist" in message


def test_a_cancelled_run_has_saved_and_does_not_come_back(
    slurm: Cluster, corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    config = write_run(folder, corpus, **LONG)
    job = submit(slurm, config)
    wait_for_a_checkpoint(folder)
    slurm.run("scancel", job)
    wait_for_the_end(slurm, job)
    assert (folder / "requeue").exists(), job_log(folder)
    wait_for_the_end(slurm, submit(slurm, config))
    assert [outcome for outcome, _ in outcomes(folder)] == ["stopped", "finished"]
    assert_like(undisturbed, folder)
