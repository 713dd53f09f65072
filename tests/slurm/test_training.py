"""Training through launch/slurm.sbatch on a real controller with two nodes, undisturbed and not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

from megatron_completedp.launch.attempts import Attempts
from tests.mcore.train_runs import losses, write_run
from tests.slurm.cluster import Cluster, cluster, wait_until
from tests.slurm.training import (
    LONG,
    TIMEOUT_S,
    assert_like,
    job_log,
    outcomes,
    submit,
    wait_for_a_checkpoint,
    wait_for_the_end,
)

#: So long that SLURM's signal, which may be half a minute late, finds it at work.
LONGER = {"training__train_steps": 6000, "checkpoint__interval": 97, "evaluation__interval": 6000}

pytestmark = [pytest.mark.slow, pytest.mark.slurm]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes, all of which each run takes."""
    with cluster(tmp_path_factory.mktemp("slurm"), nodes=2, cpus=2) as found:
        yield found


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
        "sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive",
        f"--output={tmp_path}/urgent.log", "--wrap=scontrol show hostnames; sleep 2",
    )  # fmt: skip
    wait_for_the_end(slurm, urgent)
    assert (tmp_path / "urgent.log").read_text() == "n1\nn2\n"
    wait_for_the_end(slurm, job)
    first, second = Attempts(folder).all
    assert (first.outcome, second.outcome) == ("stopped", "finished"), job_log(folder)
    # It lost not a step: it was saved when the signal came, and not at the usual interval.
    assert second.began_step == first.ended_step
    assert f"at step {second.began_step}" in (Attempts(folder).logs() / "rank_0.log").read_text()
    assert_like(undisturbed, folder)


def test_a_run_that_cannot_progress_stops_and_says_why(
    slurm: Cluster, corpus: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    config = write_run(folder, corpus, data__train=["no/such/prefix"])
    wait_for_the_end(slurm, submit(slurm, config, "--tries", "3"))
    assert outcomes(folder) == [("failed", "n1,n2")] * 3, job_log(folder)
    # Rank 0 reports what is wrong for all; its node is no worse than the other.
    assert [start.blamed for start in Attempts(folder).all] == [None] * 3
    message = job_log(folder)
    assert "3 starts of job" in message
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


def test_a_run_that_comes_to_its_time_limit_has_saved_and_goes_on(
    slurm: Cluster, corpus: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    job = submit(slurm, write_run(folder, corpus, **LONGER), "--stop-lead-s", "600")
    wait_for_a_checkpoint(folder)
    slurm.bring_time_limit_near(job)
    wait_until(
        "the end of the first start",
        lambda: outcomes(folder)[0][0] != "running",
        timeout_s=TIMEOUT_S,
    )
    # Else the next start, too, would be asked to stop as soon as it begins.
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=UNLIMITED")
    first = Attempts(folder).all[0]
    assert (first.outcome, first.blamed) == ("stopped", None), job_log(folder)
    assert first.ended_step is not None
    assert first.ended_step % LONGER["checkpoint__interval"], "a checkpoint of the usual interval"
    wait_for_a_checkpoint(folder, after=first.ended_step)
    # It goes on; that it comes to its end is for the shorter runs above.
    slurm.run("scancel", job)
    wait_for_the_end(slurm, job)
    assert Attempts(folder).all[1].began_step == first.ended_step
    # Every step once: none was lost, none was repeated.
    steps = [step for step, _ in losses(folder)]
    assert steps == list(range(1, len(steps) + 1))
