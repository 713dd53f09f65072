"""What `launch status` says of a run, with SLURM and without."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path

import pytest
from launch_samples import fake, launch, write_config

from megatron_completedp.launch.attempts import Attempts


def write_run(folder: Path, *, step: int) -> Path:
    """A run at `step` of 100, which takes 36 s a step; two starts, of which one failed."""
    config, run_dir = write_config(folder), folder / "run"
    attempts = Attempts(run_dir)
    attempts.begin("7", ("n1", "n2"))
    attempts.end("7", "failed", "rank 1 on n2 was ended by SIGKILL", "n2")
    attempts.begin("7", ("n1", "n3"))
    shutil.copy(config, run_dir / "config.yaml")
    rows = [
        {"kind": "train", "step": step, "loss": 3.25, "tokens_per_s": 1234.5, "step_s": 36.0},
        {"kind": "eval", "step": step, "loss": 3.5},
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_dir


def shown(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Title and text of each line."""
    lines = capsys.readouterr().out.splitlines()
    return dict(re.split(r" {2,}", line, maxsplit=1) for line in lines)


def test_a_run_in_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = write_run(tmp_path, step=90)
    fake(tmp_path / "bin", monkeypatch, squeue=f"echo '7|RUNNING|n[1,3]|{run_dir}'")
    now = time.time()
    assert launch(monkeypatch, "status", str(run_dir)) == 0
    lines = shown(capsys)
    assert lines["run"] == str(run_dir)
    assert lines["progress"] == "step 90 of 100 (90.0%), loss 3.2500, 1,234 tokens/s"
    end, _, left = lines["expected end"].partition(", ")
    assert left == "after 0.10 h of training"
    # 10 steps of 36 s from now, given to the minute.
    expected = time.mktime(time.strptime(end, "%Y-%m-%d %H:%M"))
    assert expected == pytest.approx(now + 360, abs=65)
    assert lines["job"] == "7 RUNNING n[1,3]"
    assert lines["starts"] == "2: 1 failed, 1 running"
    assert lines["last start"].endswith("on n1,n3 from step 0")
    assert lines["last failure"] == "rank 1 on n2 was ended by SIGKILL"
    assert lines["logs"] == str(run_dir / "launch" / "start_002")


@pytest.mark.parametrize("row", ["7|PENDING|(BeginTime)|(null)", ""], ids=["waits", "stopped"])
def test_no_end_is_expected_of_a_run_that_no_job_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], row: str
) -> None:
    run_dir = write_run(tmp_path, step=90)
    fake(tmp_path / "bin", monkeypatch, squeue=f"echo '{row}'", sacct="exit 1")
    assert launch(monkeypatch, "status", str(run_dir)) == 0
    lines = shown(capsys)
    assert "expected end" not in lines
    assert lines["left"] == "0.10 h of training; no job is known to run"
    # Queued by hand it has no comment, but its start is known.
    assert lines.get("job", "") == ("7 PENDING (BeginTime)" if row else "")


def test_a_run_that_waits_for_its_first_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As examples/pipeline queues it: nothing has made its folder yet."""
    run_dir = tmp_path / "run"
    fake(tmp_path / "bin", monkeypatch, squeue=f"echo '7|PENDING|(Dependency)|{run_dir}'")
    assert launch(monkeypatch, "status", str(run_dir)) == 0
    lines = shown(capsys)
    assert lines["job"] == "7 PENDING (Dependency)"
    assert lines["progress"] == "no step yet"


def test_a_job_that_has_left_the_queue_is_in_the_accounting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = write_run(tmp_path, step=100)
    sacct = "echo 'OUT_OF_MEMORY|0:125|01:02:03|n[1,3]'"
    fake(tmp_path / "bin", monkeypatch, squeue="true", sacct=sacct)
    assert launch(monkeypatch, "status", str(run_dir)) == 0
    lines = shown(capsys)
    assert lines["jobs"] == "none in the queue"
    assert lines["last job"] == "7 OUT_OF_MEMORY, 0:125, 01:02:03, n[1,3]"
    assert lines["expected end"] == "finished"
    # A cluster without accounting says so on stderr and exits with 1.
    fake(tmp_path / "bin", monkeypatch, sacct="echo disabled >&2; exit 1")
    assert launch(monkeypatch, "status", str(run_dir)) == 0
    assert "last job" not in shown(capsys)


def test_without_slurm_the_folder_alone_speaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = write_run(tmp_path, step=90)
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert launch(monkeypatch, "status", str(run_dir)) == 0
    lines = shown(capsys)
    assert lines["jobs"].startswith("unknown: there is no squeue here")
    assert lines["progress"].startswith("step 90 of 100")
    assert lines["left"] == "0.10 h of training; no job is known to run"


def test_a_run_that_has_not_begun_and_one_that_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    fake(tmp_path / "bin", monkeypatch, squeue="true")
    assert launch(monkeypatch, "status", str(tmp_path / "run")) == 0
    assert shown(capsys)["progress"] == "no step yet"
    assert launch(monkeypatch, "status", str(tmp_path / "none")) == 1
    message = capsys.readouterr().err
    assert "none does not exist, and no job waits for it; expected the run_dir" in message
