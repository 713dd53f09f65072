"""slurm_array.sbatch and local.sh, with SLURM's commands replaced: what they call, and when."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from launch_samples import fake_slurm, run_script


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """SLURM's commands on PATH; the file in which they note requests."""
    return fake_slurm(tmp_path, monkeypatch)


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


@pytest.mark.parametrize(("asked", "passed"), [("8", "8"), ("", "unset")])
def test_a_task_has_the_cores_that_were_asked_for_or_all(
    tmp_path: Path, calls: Path, asked: str, passed: str
) -> None:
    """One core for all would slow a job down that asked for whole nodes, and say nothing."""
    seen = f'echo "${{SRUN_CPUS_PER_TASK-unset}}" >{tmp_path}/seen'
    run_script("slurm_array.sbatch", "preprocess", SRUN=seen, SLURM_CPUS_PER_TASK=asked)
    assert (tmp_path / "seen").read_text() == f"{passed}\n"
    assert f"--workers {asked or 1}" in calls.read_text()


@pytest.mark.parametrize(
    ("code", "state", "asks"),
    [
        ("75", "RUNNING|None", True),
        # Preprocessing has nothing to save, and ends by the signal.
        ("143", "RUNNING|None", True),
        ("75", "COMPLETING|None", False),
        ("143", "COMPLETING|None", False),
        ("143", "COMPLETING|TimeLimit", True),
        ("1", "RUNNING|None", False),
    ],
)
def test_a_stopped_task_is_queued_again(calls: Path, code: str, state: str, asks: bool) -> None:
    done = run_script("slurm_array.sbatch", "preprocess", SRUN_CODE=code, JOB_STATE=state)
    assert done.returncode == int(code)
    assert ("scontrol requeue 77" in calls.read_text()) == asks
    if not state.startswith("RUNNING"):
        assert "ended at its time limit" in done.stderr or "SLURM is ending job 77" in done.stderr


def test_a_task_speaks_for_itself_and_not_for_its_array(calls: Path) -> None:
    """One task of each array has the array's own number, by which SLURM means all tasks."""
    task = {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "3", "JOB": "77_3"}
    done = run_script("slurm_array.sbatch", "search", SRUN_CODE="75", **task)
    assert "scontrol requeue 77_3\n" in calls.read_text(), done.stderr


def test_a_site_that_forbids_requeues_is_told_of(calls: Path) -> None:
    done = run_script("slurm_array.sbatch", "search", SRUN_CODE="75", REQUEUE_CODE="1")
    assert done.returncode == 1
    assert "error: SLURM did not queue job 77 again" in done.stderr


@pytest.mark.parametrize("program", ["squeue", "scontrol"])
def test_a_controller_that_is_away_for_a_moment_is_asked_again(
    tmp_path: Path, calls: Path, program: str
) -> None:
    (tmp_path / "bin" / f"{program}.fails").write_text("3")
    done = run_script("slurm_array.sbatch", "search", SRUN_CODE="75")
    assert done.returncode == 75
    assert calls.read_text().count("scontrol requeue 77") == 1, done.stderr


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
