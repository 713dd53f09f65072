"""A run as its folder looks between starts: checkpoints, logs, torchrun's reports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from config_samples import small_tree

from megatron_completedp.config.cli import run_command
from megatron_completedp.launch.__main__ import main
from megatron_completedp.mcore.manifest import seal, write_manifest

ROOT = Path(__file__).parents[2]

#: As torchrun 2.13 prints it when a rank has failed.
REPORT = """\
E1122 09:40:01 torch/distributed/elastic/multiprocessing/api.py:1010] failed (exitcode: {code})
============================================================
bash FAILED
------------------------------------------------------------
Failures:
  <NO_OTHER_FAILURES>
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-22_09:40:01
  host      : machine
  rank      : {rank} (local_rank: 0)
  exitcode  : {code} (pid: 4711){name}
  error_file: <N/A>
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
============================================================
"""


#: SLURM's commands as a job calls them; requests are noted in $CALLS. srun leaves what $SRUN says.
#: The partition has the job's n1 and n2 and what $SPARE adds. `sleep` takes no time.
_PROGRAMS = {
    "scontrol": """\
if [ "$1 $2" = "show hostnames" ]; then printf '%s\\n' ${3//,/ } | sed 's/n\\[1-2\\]/n1\\nn2/'
elif [ "$1" = show ]; then
  [ -z "${SHOW_FAILS:-}" ] || exit 1
  echo "JobId=77 ReqNodeList=${REQUIRED:-(null)} ExcNodeList=${EXCLUDED:-(null)} NodeList=n[1-2]"
else echo "scontrol $*" >>"$CALLS"; [ "$1" != requeue ] || exit "${REQUEUE_CODE:-0}"; fi""",
    "squeue": """\
case "$*" in
  *--states=*) printf '77\\n%s\\n' "${OTHERS:-}" ;;
  *"--jobs ${JOB:-77} "*) echo "${JOB_STATE-RUNNING|None}" ;;
  *) exit 1 ;;
esac""",
    "sinfo": """\
printf '%s idle 8|64000|(null)|gpu:8\\n' n1 n2
printf '%b' "${SPARE:-}" """,
    "srun": 'echo "srun $*" >>"$CALLS"; eval "${SRUN:-}"; exit "${SRUN_CODE:-0}"',
    "sleep": "true",
}
_FAILS = """\
left=$(cat "$0.fails" 2>/dev/null || echo 0)
if [ "$left" -gt 0 ]; then echo $((left - 1)) >"$0.fails"; exit 1; fi
"""
#: A further node like the job's own; as $SPARE.
SPARE = "n3 alloc 8|64000|(null)|gpu:8\\n"


def fake(folder: Path, monkeypatch: pytest.MonkeyPatch, **programs: str) -> Path:
    """Programs of these names, by their shell text, before anything else on PATH; their folder."""
    folder.mkdir(exist_ok=True)
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def launch(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """`python -m megatron_completedp.launch` with these arguments; its exit code."""
    monkeypatch.setattr(sys, "argv", ["launch", *arguments])
    return run_command(main)


def fake_slurm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """SLURM's commands on PATH, in `folder`/bin; the file in which they note requests.

    One fails as often as a file beside it says, NAME.fails, before it answers.
    """
    fake(folder / "bin", monkeypatch, **{name: _FAILS + text for name, text in _PROGRAMS.items()})
    monkeypatch.setenv("CALLS", str(folder / "calls"))
    return folder / "calls"


def run_script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script of launch/ in the environment of job 77 on n1 and n2."""
    slurm = {
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_PARTITION": "all",
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


def write_config(folder: Path, **changes: Any) -> Path:
    """The YAML of the small run with its run_dir in `folder`."""
    path = folder / "run.yaml"
    tree = small_tree(run_dir=str(folder / "run"), **{"training.device": "cpu", **changes})
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def write_checkpoint(run_dir: Path, step: int) -> Path:
    """A checkpoint by its name and manifest; nothing in it can be trained."""
    path = run_dir / "checkpoints" / f"step_{step:08d}"
    path.mkdir(parents=True)
    (path / "weights").write_text(f"of step {step}")
    write_manifest(path, {"weights": seal(path / "weights")})
    return path


def report(
    logs: Path, *, node: int, rank: int, code: int, log_ends_at: float | None, says: str = ""
) -> None:
    """What torchrun says of a rank in the node's log, and the rank's log with its last change.

    The log ends with what the rank `says`, else with words of its own.
    """
    name = " (SIGKILL)" if code == -9 else ""
    text = REPORT.format(rank=rank, code=code, name=name)
    (logs / f"node_{node}.log").write_text(text)
    if log_ends_at is not None:
        log = logs / f"rank_{rank}.log"
        log.write_text(f"first line\n{says or f'last words of rank {rank}'}\n")
        os.utime(log, (log_ends_at, log_ends_at))
