"""launch/slurm.sbatch on a real controller with ranks that only end: no torch is started."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_completedp.launch.attempts import Attempts
from tests.mcore.train_runs import ROOT, write_run
from tests.slurm.cluster import Cluster, cluster
from tests.slurm.training import outcomes, wait_for_the_end

pytestmark = [pytest.mark.slow, pytest.mark.slurm]

#: In place of torchrun: a run that has not saved when the second signal comes, and then finishes.
TOO_SLOW = """\
[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || exit 0
trap 'count=$((count + 1)); [ $count -lt 2 ] || exit 143' TERM
while :; do sleep 1; done
"""
#: A rank of the first node that fails as a machine's fault makes it fail; as torchrun reports it.
FAULTY = """\
[ "$SLURM_NODEID" = 0 ] || sleep 60
printf '  time      : 2026-11-22_09:40:01\\n  host      : machine\\n'
printf '  rank      : 0 (local_rank: 0)\\n  exitcode  : -11 (pid: 1) (SIGSEGV)\\n'
exit 1
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("slurm"), nodes=2, cpus=2) as found:
        yield found


def run(slurm: Cluster, folder: Path, torchrun: str, *options: str) -> str:
    """Submit the script by hand with these words in place of torchrun; the job's log at its end."""
    python = folder / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    launches = f'case "$2" in megatron_completedp.launch) exec {sys.executable} "$@";; esac'
    python.write_text(f"#!/bin/bash\n{launches}\n{torchrun}")
    python.chmod(0o755)
    job = slurm.run(
        "sbatch", "--parsable", "--nodes=2", f"--output={folder}/job.log", *options,
        "launch/slurm.sbatch", "--config", str(write_run(folder / "run", folder)),
        cwd=ROOT,
        COMPLETEDP_VENV=str(python.parents[1]),
        PYTHONPATH=str(ROOT),
    )  # fmt: skip
    wait_for_the_end(slurm, job)
    return (folder / "job.log").read_text()


def test_a_run_that_cannot_save_in_time_says_so_and_goes_on(slurm: Cluster, tmp_path: Path) -> None:
    log = run(slurm, tmp_path, TOO_SLOW, "--time=1", "--signal=TERM@20")
    assert "was ended at its time limit" in log
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=<s>" in log
    assert outcomes(tmp_path / "run") == [("lost", "n1,n2"), ("finished", "n1,n2")], log


def test_a_faulty_node_that_none_can_replace_ends_the_run_after_its_tries(
    slurm: Cluster, tmp_path: Path
) -> None:
    """Left out, it would leave one node to a job of two, which then waits for ever."""
    log = run(slurm, tmp_path, FAULTY)
    assert outcomes(tmp_path / "run") == [("failed", "n1,n2")] * 3, log
    assert [start.blamed for start in Attempts(tmp_path / "run").all] == ["n1"] * 3
    assert "n1 failed twice but is not left out" in log
    assert "3 starts of job" in log
