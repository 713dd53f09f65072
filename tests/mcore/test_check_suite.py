"""The whole default suite of checks: it passes, within ten minutes of two cores."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_completedp.check.suite import SUITE

from .train_runs import ROOT

#: CPU seconds of ten minutes on two cores. Not wall time, which others on a machine lengthen.
LIMIT_S = 2 * 600


@pytest.mark.slow
def test_the_suite_passes_within_ten_minutes_of_two_cores(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "megatron_completedp.check", "all", "--out", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{spent:.0f} CPU seconds\n{done.stdout[-2000:]}")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert all((tmp_path / name / "report.html").exists() for name in SUITE)
    assert "PASSED: every check" in (tmp_path / "index.html").read_text(encoding="utf-8")
    assert spent < LIMIT_S
