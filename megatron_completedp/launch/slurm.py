"""SLURM's commands, and what is said where they are not there."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import megatron_completedp
from megatron_completedp.errors import LaunchError

#: A controller that does not answer within this is down.
TIMEOUT_S = 60


@dataclass(frozen=True)
class Job:
    """A job that SLURM still knows."""

    number: str
    state: str
    """As squeue says it: PENDING, RUNNING, COMPLETING, ..."""
    where: str
    """Its nodes, or in parentheses why it waits."""


def submit(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """Run an sbatch command; the number of the job. Raises LaunchError when it is refused."""
    if shutil.which("sbatch") is None:
        raise LaunchError(
            "sbatch is not on PATH: there is no SLURM here. Submit from a machine of the cluster; "
            "--dry-run prints the command. On one machine launch/local.sh trains without SLURM."
        )
    done = _run(command, environment)
    if done.returncode:
        raise LaunchError(
            f"sbatch refused the job: {done.stderr.strip()} The command was: "
            f"{command_text(command, environment)}"
        )
    # With several clusters it is NUMBER;CLUSTER.
    return done.stdout.strip().partition(";")[0]


def jobs_of(run_dir: Path, newest: str | None) -> list[Job] | None:
    """The jobs in the queue that are of the run in `run_dir`; None where squeue does not answer.

    They have it as their comment, or are the job of its `newest` start: sbatch by hand sets none.
    """
    if shutil.which("squeue") is None:
        return None
    done = _run(["squeue", "--noheader", "--format=%i|%T|%R|%k"])
    if done.returncode:
        return None
    rows = [line.split("|", 3) for line in done.stdout.splitlines()]
    return [Job(*row[:3]) for row in rows if row[0] == newest or row[3:] == [comment(run_dir)]]


def accounting(job: str) -> str | None:
    """The end of a job as the cluster's accounting has it; None without accounting."""
    if shutil.which("sacct") is None:
        return None
    fields = "--format=State%30,ExitCode,Elapsed,NodeList%60"
    done = _run(["sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={job}", fields])
    lines = done.stdout.splitlines()
    return ", ".join(lines[-1].split("|")) if not done.returncode and lines else None


def comment(run_dir: Path) -> str:
    """What a run's jobs have as their comment, by which they are found again."""
    return str(run_dir.resolve())


def script(name: str) -> Path:
    """A script of the repository's launch/. Raises LaunchError outside a checkout."""
    path = repository() / "launch" / name
    if not path.exists():
        raise LaunchError(
            f"{path} does not exist; the scripts are part of the repository. Install the package "
            "from a checkout with pip install -e, or submit the script of a checkout with sbatch."
        )
    return path


def repository() -> Path:
    """The checkout that this package is imported from."""
    return Path(megatron_completedp.__file__).parents[1]


def command_text(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """The command as one would type it."""
    assigned = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    return " ".join([*assigned, shlex.join(command)])


def _run(
    command: Sequence[str], environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise LaunchError(
            f"{command[0]} has not answered in {TIMEOUT_S} s; is SLURM's controller up? Try "
            "sinfo, and again later."
        ) from error
