"""A run as its folder looks between starts: checkpoints, logs, torchrun's reports."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml
from config_samples import small_tree

from megatron_completedp.mcore.manifest import seal, write_manifest

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


def report(logs: Path, *, node: int, rank: int, code: int, log_ends_at: float | None) -> None:
    """What torchrun says of a rank in the node's log, and the rank's log with its last change."""
    name = " (SIGKILL)" if code == -9 else ""
    text = REPORT.format(rank=rank, code=code, name=name)
    (logs / f"node_{node}.log").write_text(text)
    if log_ends_at is not None:
        log = logs / f"rank_{rank}.log"
        log.write_text(f"first line\nlast words of rank {rank}\n")
        os.utime(log, (log_ends_at, log_ends_at))
