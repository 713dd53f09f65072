"""The scripts with SLURM's commands and the interpreter replaced: what they call, and when."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from launch_samples import REPORT, write_checkpoint, write_config
from test_launch_submit import fake

from megatron_completedp.launch.attempts import Attempts
from megatron_completedp.launch.job import FIRST_PORT, PORTS, free_port

ROOT = Path(__file__).parents[2]

#: The commands that a job calls; each notes how it was called. srun leaves what SRUN says behind.
PROGRAMS = {
    "scontrol": """\
if [ "$1 $2" = "show hostnames" ]; then printf 'n1\\nn2\\n'
elif [ "$1" = show ]; then echo "JobId=77 ExcNodeList=$EXCLUDED JobState=RUNNING"
else echo "scontrol $*" >>"$CALLS"; [ "$1" != requeue ] || exit "${REQUEUE_CODE:-0}"; fi""",
    "squeue": 'echo "${JOB_STATE:-RUNNING}"',
    "srun": 'echo "srun $*" >>"$CALLS"; eval "${SRUN:-}"; exit "${SRUN_CODE:-0}"',
}
#: A report of torchrun on the second node, written where srun was told to write.
FAILED = (
    'for each in "$@"; do case $each in --output=*) logs=$(dirname "${each#*=}");; esac; done;'
    f"cat >$logs/node_1.log <<'END'\n{REPORT.format(rank=1, code=-9, name=' (SIGKILL)')}\nEND\n"
)


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """SLURM's commands on PATH; the file in which they note how they were called."""
    fake(tmp_path / "bin", monkeypatch, **PROGRAMS)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return tmp_path / "calls"


def run_script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script of launch/ in the environment of job 77 on n1 and n2."""
    slurm = {
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "COMPLETEDP_VENV": sys.prefix,
        "PYTHONPATH": str(ROOT),
        "COMPLETEDP_TRIES": "2",
        "COMPLETEDP_PROCESSES": "4",
        "SLURM_CPUS_PER_TASK": "8",
    }
    return subprocess.run(
        ["bash", str(ROOT / "launch" / name), *arguments],
        env={**os.environ, **slurm, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def train(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_script("slurm.sbatch", "--config", str(write_config(tmp_path)), **environment)


def starts(tmp_path: Path) -> list[str]:
    return [attempt.outcome for attempt in Attempts(tmp_path / "run").all]


def test_the_ranks_meet_on_the_first_node_and_each_has_a_log(tmp_path: Path, calls: Path) -> None:
    done = train(tmp_path)
    assert done.returncode == 0, done.stderr
    (call,) = calls.read_text().splitlines()
    logs = tmp_path / "run" / "launch" / "start_001"
    for part in (
        f"srun --kill-on-bad-exit=1 --output={logs}/node_%n.log bash -c",
        f"{sys.prefix}/bin/python --nnodes 2 --nproc-per-node 4 --master-addr n1",
        f"--no-python bash {ROOT}/launch/rank.sh --config {tmp_path}/run.yaml",
    ):
        assert part in call
    # The job's own port, or one of the next where it is taken here.
    port = int(call.split("--master-port ")[1].split()[0])
    assert 0 <= port - (FIRST_PORT + 77) < PORTS
    assert starts(tmp_path) == ["finished"]
    assert "is finished" in done.stderr


@pytest.mark.parametrize(("excluded", "then"), [("(null)", "n2"), ("n[7-9]", "n[7-9],n2")])
def test_a_failure_is_queued_again_without_the_node_that_failed_twice(
    tmp_path: Path, calls: Path, excluded: str, then: str
) -> None:
    for step in (1, 2):
        # A checkpoint that appears while the ranks run: each of the two starts makes progress.
        ahead = write_checkpoint(tmp_path / f"ahead{step}", step)
        saved = tmp_path / "run" / "checkpoints"
        saves = f"mkdir -p {saved}; mv {ahead} {saved}; {FAILED}"
        done = train(tmp_path, SRUN=saves, SRUN_CODE="1", EXCLUDED=excluded)
        assert done.returncode == 1
        assert "rank 1 on n2 was ended by SIGKILL" in done.stderr
    asked = [line for line in calls.read_text().splitlines() if line.startswith("scontrol")]
    assert asked == [
        "scontrol requeue 77",
        "scontrol requeue 77",
        # What the user had excluded stays excluded.
        f"scontrol update JobId=77 ExcNodeList={then}",
    ]


def test_a_run_that_cannot_progress_is_not_queued_again(tmp_path: Path, calls: Path) -> None:
    train(tmp_path, SRUN=FAILED, SRUN_CODE="1")
    done = train(tmp_path, SRUN=FAILED, SRUN_CODE="1")
    assert done.returncode == 1
    assert "2 starts of job 77 in a row ended without a new checkpoint" in done.stderr
    assert calls.read_text().count("scontrol requeue") == 1


@pytest.mark.parametrize("state", ["COMPLETING", ""])
def test_a_job_that_slurm_is_ending_asks_for_nothing(
    tmp_path: Path, calls: Path, state: str
) -> None:
    """A cancelled job must not come back, and a preempted one is back by itself."""
    saved = f"touch {tmp_path}/run/requeue"
    programs = tmp_path / "bin" / "squeue"
    programs.write_text(f"#!/bin/bash\necho {state}\n")
    done = train(tmp_path, SRUN=saved, SRUN_CODE="1")
    assert done.returncode == 1
    assert "scontrol requeue" not in calls.read_text()
    # The next start learns from the run's file how this one ended.
    assert starts(tmp_path) == ["running"]
    train(tmp_path)
    assert starts(tmp_path)[0] == "stopped"


def test_a_cluster_that_forbids_requeues_is_told_of(tmp_path: Path, calls: Path) -> None:
    done = train(tmp_path, SRUN=f"touch {tmp_path}/run/requeue", SRUN_CODE="1", REQUEUE_CODE="1")
    assert done.returncode == 1
    assert "this cluster does not let a job queue itself again" in done.stderr
    assert "submit the run again" in " ".join(done.stderr.split())


def test_ranks_that_do_not_divide_the_run_start_nothing(tmp_path: Path, calls: Path) -> None:
    done = train(tmp_path, COMPLETEDP_PROCESSES="5")
    assert done.returncode == 2
    assert "expected a multiple of 10" in done.stderr
    assert not calls.exists()
    assert not (tmp_path / "run").exists()


def test_a_container_holds_every_python(tmp_path: Path, calls: Path) -> None:
    """The image's interpreter counts the starts, too; srun answers here in its place."""
    answer = f'case "$*" in *" begin "*) echo 20077 {tmp_path};; *" end "*) echo done;; esac'
    done = train(
        tmp_path,
        COMPLETEDP_CONTAINER="image.sqsh",
        COMPLETEDP_CONTAINER_MOUNTS="/data:/data",
        SRUN=answer,
    )
    assert done.returncode == 0, done.stderr
    begin, ranks, end = calls.read_text().splitlines()
    where = "--container-image=image.sqsh --container-workdir=" + os.getcwd()
    where += " --container-mounts=/data:/data"
    alone = f"srun --nodes=1 --ntasks=1 --nodelist=n1 {where} python3 -m megatron_completedp.launch"
    assert begin.startswith(f"{alone} begin --job 77 --nodes n1 n2 --processes 4 --tries 2 -- ")
    assert f"{where} bash -c" in ranks
    assert end.startswith(f"{alone} end --job 77 --tries 2 --exit-code 0 -- ")


@pytest.mark.parametrize("name", ["slurm.sbatch", "slurm_array.sbatch"])
def test_started_without_sbatch_the_scripts_say_so(name: str) -> None:
    done = run_script(name, "search", SLURM_JOB_ID="")
    assert done.returncode == 1
    assert "submit this script with sbatch" in done.stderr


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["preprocess", "--merge", "all"], "data preprocess --workers 8 --merge all"),
        (["ladder", "--config", "w.yaml"], "check transfer --config w.yaml"),
        (["search", "--config", "s.yaml"], "search worker --config s.yaml"),
    ],
)
def test_a_task_of_an_array(calls: Path, words: list[str], command: str) -> None:
    done = run_script("slurm_array.sbatch", *words)
    assert done.returncode == 0, done.stderr
    python = f"{sys.prefix}/bin/python"
    assert calls.read_text() == f"srun --ntasks=1 {python} -m megatron_completedp.{command}\n"


@pytest.mark.parametrize(
    ("code", "state", "asks"),
    [("75", "RUNNING", True), ("75", "COMPLETING", False), ("1", "RUNNING", False)],
)
def test_a_stopped_task_is_queued_again(calls: Path, code: str, state: str, asks: bool) -> None:
    done = run_script("slurm_array.sbatch", "search", SRUN_CODE=code, JOB_STATE=state)
    assert done.returncode == int(code)
    assert ("scontrol requeue 77" in calls.read_text()) == asks


def test_bad_words(calls: Path) -> None:
    done = run_script("slurm_array.sbatch", "serch")
    assert done.returncode == 2
    assert "the command is 'serch'; expected preprocess, ladder or search" in done.stderr
    for processes in ("0", "9", "two", "--config"):
        done = run_script("local.sh", processes)
        assert done.returncode == 2
        assert f"the number of processes is '{processes}'; expected 1 to 8" in done.stderr
    done = run_script("local.sh", "2", COMPLETEDP_VENV="/nowhere")
    assert done.returncode == 2
    assert "there is no /nowhere/bin/python" in done.stderr
    assert not calls.exists()


def test_a_taken_port_is_passed_over() -> None:
    first = free_port("123")
    with socket.create_server(("", first)):
        assert first < free_port("123") < first + PORTS
