"""slurm.sbatch with SLURM's commands and the interpreter replaced: what it calls, and when."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from launch_samples import (
    REPORT,
    ROOT,
    SPARE,
    fake_slurm,
    run_script,
    write_checkpoint,
    write_config,
)

from megatron_completedp.launch.attempts import Attempts
from megatron_completedp.launch.job import FIRST_PORT, PORTS, free_port

#: A report of torchrun on the second node, written where srun was told to write.
FAILED = (
    'for each in "$@"; do case $each in --output=*) logs=$(dirname "${each#*=}");; esac; done;'
    f"cat >$logs/node_1.log <<'END'\n{REPORT.format(rank=1, code=-9, name=' (SIGKILL)')}\nEND\n"
)


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """SLURM's commands on PATH; the file in which they note requests."""
    return fake_slurm(tmp_path, monkeypatch)


def train(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_script("slurm.sbatch", "--config", str(write_config(tmp_path)), **environment)


def starts(tmp_path: Path) -> list[str]:
    return [attempt.outcome for attempt in Attempts(tmp_path / "run").all]


def asked(calls: Path) -> list[str]:
    """What was asked of SLURM's controller."""
    return [line for line in calls.read_text().splitlines() if line.startswith("scontrol")]


def fail_with_progress(tmp_path: Path, step: int, **environment: str) -> str:
    """A start that writes a checkpoint while its ranks run, and fails on n2; the job's log."""
    ahead = write_checkpoint(tmp_path / f"ahead{step}", step)
    saved = tmp_path / "run" / "checkpoints"
    saves = f"mkdir -p {saved}; mv {ahead} {saved}; {FAILED}"
    done = train(tmp_path, SRUN=saves, SRUN_CODE="1", **environment)
    assert done.returncode == 1
    assert "rank 1 on n2 was ended by SIGKILL" in done.stderr
    return done.stderr


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


@pytest.mark.parametrize(("excluded", "then"), [("(null)", "n2"), ("n8,n9", "n8,n9,n2")])
def test_a_failure_is_queued_again_without_the_node_that_failed_twice(
    tmp_path: Path, calls: Path, excluded: str, then: str
) -> None:
    for step in (1, 2):
        fail_with_progress(tmp_path, step, EXCLUDED=excluded, SPARE=SPARE)
    assert asked(calls) == [
        "scontrol requeue 77",
        "scontrol requeue 77",
        # What the user had excluded stays excluded.
        f"scontrol update JobId=77 ExcNodeList={then}",
    ]


@pytest.mark.parametrize(
    "cluster",
    [
        {},
        {"SPARE": SPARE.replace("alloc", "drain")},
        {"SPARE": SPARE.replace("alloc", "idle*")},
        {"SPARE": SPARE.replace("gpu:8", "(null)")},
        {"SPARE": SPARE, "EXCLUDED": "n3"},
        {"SPARE": SPARE, "REQUIRED": "n[1-2]"},
        {"SPARE": SPARE, "SLURM_JOB_RESERVATION": "course"},
        {"SPARE": SPARE, "SHOW_FAILS": "1"},
    ],
    ids=["none", "drained", "silent", "kind", "excluded", "named", "reserved", "unknown"],
)
def test_a_node_stays_where_the_job_would_wait_for_another_for_ever(
    tmp_path: Path, calls: Path, cluster: dict[str, str]
) -> None:
    attempts = Attempts(tmp_path / "run")
    attempts.begin("77", ["n1", "n2"])
    attempts.end("77", "failed", blamed="n2")
    assert "n2 failed twice but is not left out" in fail_with_progress(tmp_path, 1, **cluster)
    assert asked(calls) == ["scontrol requeue 77"]


def test_a_run_that_cannot_progress_is_not_queued_again(tmp_path: Path, calls: Path) -> None:
    train(tmp_path, SRUN=FAILED, SRUN_CODE="1")
    done = train(tmp_path, SRUN=FAILED, SRUN_CODE="1")
    assert done.returncode == 1
    assert "2 starts of job 77 in a row ended without a new checkpoint" in done.stderr
    assert calls.read_text().count("scontrol requeue") == 1


@pytest.mark.parametrize("state", ["COMPLETING|None", ""])
def test_a_job_that_slurm_is_ending_asks_for_nothing(
    tmp_path: Path, calls: Path, state: str
) -> None:
    """A cancelled job must not come back, and a preempted one is back by itself."""
    saved = f"touch {tmp_path}/run/requeue"
    done = train(tmp_path, SRUN=saved, SRUN_CODE="1", JOB_STATE=state)
    assert done.returncode == 1
    assert "SLURM is ending job 77" in done.stderr
    assert "cancelled, it does not: submit it again" in " ".join(done.stderr.split())
    assert "scontrol requeue" not in calls.read_text()
    # The next start learns from the run's file how this one ended.
    assert starts(tmp_path) == ["running"]
    train(tmp_path)
    assert starts(tmp_path)[0] == "stopped"


def test_a_job_that_came_to_its_time_limit_goes_on_and_says_what_was_too_slow(
    tmp_path: Path, calls: Path
) -> None:
    late = {"SRUN_CODE": "1", "JOB_STATE": "COMPLETING|TimeLimit"}
    done = train(tmp_path, **late, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="300")
    assert done.returncode == 1
    message = " ".join(done.stderr.split())
    assert "it had not stopped 300 s after it was asked to" in message
    assert "stop_lead_s" in message
    assert asked(calls) == ["scontrol requeue 77"]
    # It is counted as lost, so one that never saves in time ends as well.
    train(tmp_path, **late)
    done = train(tmp_path, **late)
    assert "2 starts of job 77 in a row ended without a new checkpoint" in done.stderr
    assert len(asked(calls)) == 2


@pytest.mark.parametrize(
    ("program", "times"), [("squeue", 4), ("squeue", 99), ("scontrol", 4)], ids=str
)
def test_a_controller_that_does_not_answer_does_not_end_a_run(
    tmp_path: Path, calls: Path, program: str, times: int
) -> None:
    away = f"echo {times} >{tmp_path}/bin/{program}.fails; touch {tmp_path}/run/requeue"
    done = train(tmp_path, SRUN=away, SRUN_CODE="1")
    assert asked(calls) == ["scontrol requeue 77"], done.stderr
    assert ("taken as not" in done.stderr) == (times == 99)


def test_a_site_that_forbids_requeues_is_told_of(tmp_path: Path, calls: Path) -> None:
    done = train(tmp_path, SRUN=f"touch {tmp_path}/run/requeue", SRUN_CODE="1", REQUEUE_CODE="1")
    assert done.returncode == 1
    assert "error: SLURM did not queue job 77 again" in done.stderr
    assert "submit the same again" in " ".join(done.stderr.split())


def test_a_run_that_another_job_trains_is_not_begun(tmp_path: Path, calls: Path) -> None:
    Attempts(tmp_path / "run").begin("70", ["n3"])
    done = train(tmp_path, OTHERS="70")
    assert done.returncode == 1
    assert "job 70 is training" in done.stderr
    assert not calls.exists()
    # Negative control: that job is gone.
    assert train(tmp_path, OTHERS="71").returncode == 0


def test_a_yaml_that_was_changed_since_moves_no_job_to_another_run(
    tmp_path: Path, calls: Path
) -> None:
    """The YAML becomes another run's while the ranks run; the end is of the run that began."""
    config = tmp_path / "run.yaml"
    edit = f"sed -i 's#{tmp_path}/run#{tmp_path}/other#' {config}; touch {tmp_path}/run/requeue"
    done = train(tmp_path, SRUN=edit, SRUN_CODE="1")
    assert starts(tmp_path) == ["stopped"], done.stderr
    assert asked(calls) == ["scontrol requeue 77"]
    done = run_script("slurm.sbatch", "--config", str(config), SLURM_RESTART_COUNT="1")
    assert done.returncode == 1
    assert f"{tmp_path}/other has no start of it" in done.stderr
    assert not (tmp_path / "other").exists()


def test_ranks_that_do_not_divide_the_run_start_nothing(tmp_path: Path, calls: Path) -> None:
    done = train(tmp_path, COMPLETEDP_PROCESSES="5")
    assert done.returncode == 2
    assert "expected a multiple of 10" in done.stderr
    assert not calls.exists()
    assert not (tmp_path / "run").exists()


def test_a_container_holds_every_python(tmp_path: Path, calls: Path) -> None:
    """The image's interpreter counts the starts, too; srun answers here in its place."""
    logs = tmp_path / "run" / "launch" / "start_001"
    answer = f'case "$*" in *" begin "*) echo 20077 {logs};; *" end "*) echo done;; esac'
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
    assert begin.startswith(f"{alone} begin --job 77 --nodes n1 n2 --processes 4 --tries 2 ")
    assert f"{where} bash -c" in ranks
    ended = f"--run-dir {tmp_path}/run --tries 2 --exit-code 0 --spare 0"
    assert end == f"{alone} end --job 77 {ended}"


def test_a_taken_port_is_passed_over() -> None:
    first = free_port("123")
    with socket.create_server(("", first)):
        assert first < free_port("123") < first + PORTS
