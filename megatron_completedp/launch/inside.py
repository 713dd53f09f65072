"""`begin` and `end`: what launch/slurm.sbatch asks before and after the ranks of a start."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from megatron_completedp.launch import job
from megatron_completedp.launch.attempts import Attempts
from megatron_completedp.launch.command import is_kept, read_command


@dataclass(frozen=True, kw_only=True)
class BeginFlags:
    """What the script knows before the ranks start; the training command is after --."""

    job: str
    """SLURM's number of the job."""
    nodes: tuple[str, ...]
    """Names of its nodes, in order."""
    processes: int
    """Ranks on each."""
    tries: int
    """Starts in a row without a new checkpoint after which it stops."""
    restarts: int
    """How often SLURM has queued the job again."""
    running: tuple[str, ...] = ()
    """The user's jobs that run or have not quite ended."""


@dataclass(frozen=True, kw_only=True)
class EndFlags:
    """What the script knows after the ranks' end."""

    job: str
    """SLURM's number of the job."""
    run_dir: str
    """The run's folder, as it was at the beginning: its YAML may name another by now."""
    tries: int
    """Starts in a row without a new checkpoint after which it stops."""
    exit_code: int
    """Of srun."""
    spare: int
    """Nodes that the job could have in place of its own."""


def begin(argv: Sequence[str], rest: Sequence[str]) -> int:
    """Count a start; print the port of its rendezvous and the folder of its logs."""
    flags = tyro.cli(BeginFlags, args=list(argv))
    config, _ = read_command(rest)
    port = job.begin(
        config,
        job=flags.job,
        nodes=flags.nodes,
        ranks=len(flags.nodes) * flags.processes,
        tries=flags.tries,
        running=flags.running,
        # The copy of a submitted run does not change; what sbatch was given by hand may have.
        restarts=0 if is_kept(config, rest) else flags.restarts,
    )
    print(port, Attempts(Path(config.run_dir)).logs().resolve())
    return 0


def end(argv: Sequence[str], rest: Sequence[str]) -> int:
    """Count its end; print done, requeue or stop, and the nodes to do without."""
    flags = tyro.cli(EndFlags, args=list(argv))
    verdict = job.end(
        Path(flags.run_dir),
        job=flags.job,
        tries=flags.tries,
        exit_code=flags.exit_code,
        spare=flags.spare,
    )
    print(verdict.message, file=sys.stderr)
    print(verdict.word, ",".join(verdict.exclude))
    return 0
