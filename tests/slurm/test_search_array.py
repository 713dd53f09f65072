"""The search's array script on a real controller with two nodes, against a real PostgreSQL."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

pytest.importorskip("optuna")

from optuna.trial import TrialState

from tests import postgres
from tests.dist.test_search_kill import ROOT, check_whole, settings, trials_of
from tests.slurm.cluster import cluster, wait_until

WORKERS, TRIALS = 4, 32
#: So long that a worker is stopped within a trial and not between two: 10 steps make one.
STEP_S = 0.3


@pytest.mark.slow
@pytest.mark.slurm
def test_an_array_finishes_a_study_though_workers_are_preempted_and_killed(tmp_path: Path) -> None:
    # The script's python, with training that takes seconds at most.
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f'#!/bin/sh\nshift 2\nexec {sys.executable} -m tests.dist.search_lives "$@"\n'
    )
    python.chmod(0o755)
    out = tmp_path / "out"
    with postgres.server() as server, cluster(tmp_path / "slurm", nodes=2, cpus=2) as slurm:
        config = settings(tmp_path, trials=TRIALS, database={"url": server.database()})
        job = slurm.run(
            "sbatch", "--parsable", f"--array=0-{WORKERS - 1}", "--mem-per-cpu=100M",
            f"--output={tmp_path}/%a.log", "launch/slurm_array.sbatch",
            "search", "--config", str(config), "--out", str(out),
            cwd=ROOT,
            COMPLETEDP_VENV=str(python.parents[1]), SEARCH_STEP_S=str(STEP_S),
        )  # fmt: skip
        begun = out / "study.json"
        wait_until("the study has begun", begun.exists)
        wait_until(
            "every worker has finished a trial", lambda: len(workers(config, out)) == WORKERS
        )
        running = slurm.jobs()
        assert {node for _, node in running.values()} == {"n1", "n2"}
        before = {trial.number for trial in trials_of(config, out)}
        # As a preemption does: SIGTERM, the job waits in the queue again.
        slurm.run("scontrol", "requeue", f"{job}_0")
        # As the machine's end does, or the kernel's when memory runs out.
        wait_until("task 1 trains", lambda: training(config, out, task=1) is not None)
        os.kill(training(config, out, task=1) or 0, signal.SIGKILL)
        wait_until("all trials have ended", lambda: ended(config, out))
        found = trials_of(config, out)
        assert len(before) < TRIALS, "the study was over before anything was stopped"
        check_whole(found, count=TRIALS)
        tries = [trial for trial in found if trial.system_attrs.get("failed_trial") is not None]
        ends = {bool(trial.user_attrs.get("stopped")) for trial in found if trial.values is None}
        # Given back after the signal, and found without its lock after the kill.
        assert ends == {True, False}
        assert len(tries) == 2
        logs = "".join(file.read_text() for file in tmp_path.glob("*.log"))
        assert "lost its worker" in logs
        slurm.run("scancel", job)


def workers(config: Path, out: Path) -> set[str]:
    """Names of the workers that have ended a trial."""
    done = [trial for trial in trials_of(config, out) if trial.state.is_finished()]
    return {trial.user_attrs["worker"] for trial in done}


def training(config: Path, out: Path, *, task: int) -> int | None:
    """The process of the array's task, if it has a trial; a worker's name ends in its pid."""
    for trial in trials_of(config, out):
        pid = int(trial.user_attrs.get("worker", "-0").rpartition("-")[2])
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except FileNotFoundError:
            continue
        mine = f"SLURM_ARRAY_TASK_ID={task}".encode() in environment
        if trial.state == TrialState.RUNNING and mine:
            return pid
    return None


def ended(config: Path, out: Path) -> bool:
    found = trials_of(config, out)
    complete = [trial for trial in found if trial.values is not None]
    return len(complete) == TRIALS and all(trial.state.is_finished() for trial in found)
