"""`python -m megatron_completedp.launch`: queue training and arrays on SLURM, and follow them."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import tyro

from megatron_completedp.config.cli import read_arguments, run_command
from megatron_completedp.config.load import build
from megatron_completedp.config.run import RunConfig
from megatron_completedp.errors import ConfigError
from megatron_completedp.launch import inside, submit
from megatron_completedp.launch.command import keep_command, read_command
from megatron_completedp.launch.settings import (
    ArraySettings,
    ClusterSettings,
    JobSettings,
    TrainSettings,
)
from megatron_completedp.launch.status import status
from megatron_completedp.plan.devices import find_device

PROG = "python -m megatron_completedp.launch"
#: Of the bf16 peak, unless --utilization says otherwise.
UTILIZATION = 0.4

E = TypeVar("E")


@dataclass(frozen=True, kw_only=True)
class TrainJobFlags:
    """Flags of `train` that are no settings of the cluster."""

    config: str
    """YAML of the run. Flags of the training command come after --."""
    gpu: str | None = None
    """Estimate memory and time on this GPU, one of A100-80, H100, H200, B200; refuse what does
    not fit."""
    utilization: float | None = None
    """With --gpu: part of the bf16 peak that matrix products are expected to reach, 0 to 1; 0.4
    unless given."""
    dry_run: bool = False
    """Print an sbatch command that trains this YAML, and its layout; queue and write nothing."""


@dataclass(frozen=True, kw_only=True)
class ArrayFlags:
    """Flags of `array` that are no settings of the cluster."""

    tasks: int
    """Tasks of the array; any number of them shares the work out."""
    dry_run: bool = False
    """Print the sbatch command; queue nothing."""


@dataclass(frozen=True, kw_only=True)
class StatusFlags:
    """Flags of `status`."""

    run_dirs: tyro.conf.Positional[tuple[str, ...]]
    """Folders of runs."""


def _train(argv: Sequence[str], rest: Sequence[str]) -> int:
    cluster, flags = _cluster(argv, "train", TrainSettings, TrainJobFlags)
    arguments = ["--config", flags.config, *rest]
    config, own = read_command(arguments)
    print(f"run      {config.run_dir}: {config.steps:,} steps of {config.batch_tokens:,} tokens")
    print(f"layout   {submit.layout_text(config, cluster)}")
    _print_needs(config, cluster, flags)
    if not flags.dry_run:
        submit.check_queue(config)
        arguments = keep_command(config, own)
    submission = submit.training_job(config, cluster, arguments)
    print(f"command  {submission}")
    if not flags.dry_run:
        print(f"job      {submission.submit()}; follow it with: {PROG} status {config.run_dir}")
    return 0


def _print_needs(config: RunConfig, cluster: ClusterSettings, flags: TrainJobFlags) -> None:
    """Memory and time on --gpu, if it is given."""
    if flags.gpu is not None:
        device, utilization = find_device(flags.gpu), flags.utilization
        if utilization is None:
            utilization = UTILIZATION
        print(f"needs    {submit.estimate_text(config, cluster, device, utilization)}")
    elif flags.utilization is not None:
        raise ConfigError(
            f"--utilization is {flags.utilization:g}, but there is no --gpu to estimate for; add "
            "one, such as --gpu H100, or leave --utilization out."
        )


def _array(argv: Sequence[str], rest: Sequence[str]) -> int:
    cluster, flags = _cluster(argv, "array", ArraySettings, ArrayFlags)
    submission = submit.array_job(flags.tasks, cluster, rest)
    print(f"command  {submission}")
    if not flags.dry_run:
        print(f"job      {submission.submit()}")
    return 0


def _status(argv: Sequence[str], rest: Sequence[str]) -> int:
    text = COMMANDS["status"].text
    flags = tyro.cli(StatusFlags, prog=f"{PROG} status", description=text, args=list(argv))
    if not flags.run_dirs:
        raise ConfigError(f"status of which run? Name its folder: {PROG} status runs/target.")
    print("\n\n".join(status(Path(folder)) for folder in flags.run_dirs))
    return 0


def _cluster(
    argv: Sequence[str], name: str, settings: type[JobSettings], extra: type[E]
) -> tuple[ClusterSettings, E]:
    """The cluster's settings from `--cluster` and flags, and the command's own flags.

    The flags are those of `settings`; the file may hold what other kinds of jobs need.
    """
    tree, flags = read_arguments(
        argv,
        settings,
        prog=f"{PROG} {name}",
        description=COMMANDS[name].text,
        extra=extra,
        file_flag="cluster",
    )
    return build(ClusterSettings, tree), flags


@dataclass(frozen=True)
class Command:
    """One thing to do."""

    summary: str
    """In a line."""
    details: str
    """The rest of its own help."""
    do: Callable[[Sequence[str], Sequence[str]], int]
    """Takes the arguments before -- and those after it."""

    @property
    def text(self) -> str:
        """What its own help begins with."""
        return f"{self.summary} {self.details}"


COMMANDS: dict[str, Command] = {
    "train": Command(
        "Queue a run on nodes x processes ranks.",
        "Checks that the layout fits, with --gpu its memory too, prints the sbatch command and "
        "runs it. What is queued "
        "is a copy of the run, which later edits of the YAML do not reach. The job saves "
        "when it is preempted and before its time limit, is queued again after that and after a "
        "failure, and goes on from the newest checkpoint; after --tries starts without a new one "
        "it stops and says why.\n\nExample:\n"
        f"  {PROG} train --config run.yaml --cluster cluster.yaml --nodes 4 --gpu H100 --dry-run "
        "-- --tensor-model-parallel-size 2",
        _train,
    ),
    "array": Command(
        "Queue an array whose tasks share preprocessing, a ladder's runs or a search's trials.",
        f"After -- comes one of {', '.join(submit.ARRAY_COMMANDS)} and its flags. A task that is "
        "preempted or comes to its time limit is queued again: ladders and searches save before, "
        "preprocessing keeps the shards that are finished.\n\nExample:\n"
        f"  {PROG} array --tasks 32 --cluster cluster.yaml -- search --config search.yaml "
        "--out /shared/search",
        _array,
    ),
    "status": Command(
        "Show a run's jobs, progress, expected end, starts and last failure.",
        f"Only reads.\n\nExample:\n  {PROG} status runs/target",
        _status,
    ),
    "begin": Command("Count a start; print its port and logs.", "For slurm.sbatch.", inside.begin),
    "end": Command("Count its end; print what follows.", "For slurm.sbatch.", inside.end),
}

_SHOWN = ("train", "array", "status")


def usage() -> str:
    """The text of `--help` without a command's name."""
    lines = [f"usage: {PROG} COMMAND [flags] [-- arguments of what is launched]", ""]
    lines += [f"  {name:<8}{COMMANDS[name].summary}" for name in _SHOWN]
    lines += [
        "",
        "The scripts are launch/slurm.sbatch and launch/slurm_array.sbatch, which sbatch takes",
        "without this command, too; launch/env.sh is the place for modules and variables. What",
        "a cluster wants to know (partition, account, ...) stands in the YAML of --cluster.",
        f"`{PROG} COMMAND --help` lists the flags.",
        "",
        "Example:",
        f"  {PROG} train --config run.yaml --nodes 2 --processes-per-node 8 --dry-run",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Do what `argv` says. Returns the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    name, *own = argv
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, _SHOWN)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(_SHOWN)}."
        raise ConfigError(f"unknown command {name!r}; {hint}")
    split = own.index("--") if "--" in own else len(own)
    return COMMANDS[name].do(own[:split], own[split + 1 :])


if __name__ == "__main__":
    sys.exit(run_command(main))
