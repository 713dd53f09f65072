"""A node that fails, on a real controller with a node more than the run takes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

from megatron_completedp.launch.attempts import Attempts, newest_step
from tests.mcore.train_runs import write_run
from tests.slurm.cluster import cluster, wait_until
from tests.slurm.training import (
    LONG,
    assert_like,
    job_log,
    outcomes,
    submit,
    wait_for_a_checkpoint,
    wait_for_the_end,
)


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


@pytest.mark.slow
@pytest.mark.slurm
def test_a_node_whose_rank_is_killed_twice_is_left_out(
    corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with cluster(tmp_path / "slurm", nodes=3, cpus=2) as slurm:
        job = submit(slurm, write_run(folder, corpus, **LONG))
        for _ in range(2):
            wait_for_a_checkpoint(folder, after=newest_step(folder))
            os.kill(rank_process(job, 0), signal.SIGKILL)
            killed = len(Attempts(folder).all)
            again = lambda: len(Attempts(folder).all) > killed  # noqa: B023, E731
            wait_until("the next start", again, timeout_s=300)
        wait_for_the_end(slurm, job)
    expected = [("failed", "n1,n2"), ("failed", "n1,n2"), ("finished", "n2,n3")]
    assert outcomes(folder) == expected, job_log(folder)
    first = Attempts(folder).all[0]
    assert (first.blamed, first.reason) == ("n1", "rank 0 on n1 was ended by SIGKILL")
    assert "does without n1, which failed twice" in job_log(folder)
    assert_like(undisturbed, folder)
