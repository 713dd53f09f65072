"""What examples/pipeline queues, with sbatch replaced."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launch_samples import ROOT, fake, launch


@pytest.fixture
def queued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The arguments of sbatch for each job of the chain, by the job's name."""
    shutil.copytree(ROOT / "examples" / "pipeline", tmp_path / "examples" / "pipeline")
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    out = tmp_path / "runs" / "pipeline"
    out.mkdir(parents=True)
    (out / "tokenizer.model").touch()
    # One job a line, with a character between arguments that none of them has.
    note = r"""IFS=$'\x1f'; echo "$*" >>"$CALLS"; wc -l <"$CALLS" """
    fake(tmp_path / "bin", monkeypatch, sbatch=note)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("COMPLETEDP_VENV", sys.prefix)
    subprocess.run([tmp_path / "examples" / "pipeline" / "submit.sh"], check=True, timeout=60)
    calls = [line.split("\x1f") for line in (tmp_path / "calls").read_text().splitlines()]
    return {call[1].removeprefix("--job-name="): call for call in calls}


def test_each_job_waits_for_the_one_before(queued: dict[str, list[str]]) -> None:
    assert list(queued) == ["preprocess", "ladder", "search", "recipe", "target", "export"]
    for number, call in enumerate(list(queued.values())[1:], start=1):
        assert f"--dependency=afterok:{number}" in call


def test_status_knows_the_target_before_it_starts(
    queued: dict[str, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (comment,) = [word for word in queued["target"] if word.startswith("--comment=")]
    row = f"5|PENDING|(Dependency)|{comment.removeprefix('--comment=')}"
    fake(tmp_path / "bin", monkeypatch, squeue=f"echo '{row}'")
    assert launch(monkeypatch, "status", str(tmp_path / "runs" / "pipeline" / "target")) == 0
    assert "5 PENDING (Dependency)" in capsys.readouterr().out


@pytest.mark.parametrize("there", [True, False])
def test_an_exported_model_is_not_exported_again(
    queued: dict[str, list[str]], tmp_path: Path, there: bool
) -> None:
    """The command refuses the folder, which would fail the last job of a repeated chain."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/ran\n')
    python.chmod(0o755)
    if there:
        (tmp_path / "runs" / "pipeline" / "hf").mkdir()
    (wrapped,) = [word for word in queued["export"] if word.startswith("--wrap=")]
    environment = {**os.environ, "COMPLETEDP_VENV": str(tmp_path / "venv")}
    line = wrapped.removeprefix("--wrap=")
    subprocess.run(["sh", "-c", line], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "ran").exists() != there
    if not there:
        expected = "to-hf runs/pipeline/target --out runs/pipeline/hf\n"
        assert (tmp_path / "ran").read_text().endswith(expected)
