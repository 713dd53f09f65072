"""Runs that tests of launch/slurm.sbatch submit and follow."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_completedp.launch.attempts import Attempts, newest_step
from tests.mcore.train_runs import ROOT, losses
from tests.slurm.cluster import Cluster, wait_until

#: So many steps that a run is still at it when a test has seen it begin; seconds on an idle core.
LONG = {"training__train_steps": 400, "checkpoint__interval": 20, "evaluation__interval": 200}
#: For what takes seconds on an idle machine.
TIMEOUT_S = 600


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
