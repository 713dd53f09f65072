"""The training command of a job, and the copy of its run that a queued job keeps.

SLURM keeps a job's script, but not the YAML that the script names. A job that waits, or is queued
again days later, is not to train what that file has become in the meantime.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_completedp.config.cli import load_run
from megatron_completedp.config.load import to_yaml
from megatron_completedp.config.run import RunConfig
from megatron_completedp.data.atomic import atomic_write
from megatron_completedp.errors import ConfigError, LaunchError
from megatron_completedp.train import folder as run_folder
from megatron_completedp.train.__main__ import PROG, TrainFlags


def read_command(arguments: Sequence[str]) -> tuple[RunConfig, TrainFlags]:
    """The run that the arguments of the training command describe, and the command's own flags.

    Raises ConfigError for a bad run, and for flags with which the command would not train.
    """
    described = f"Of the training command, which see: {PROG} --help"
    config, flags = load_run(arguments, prog=PROG, description=described, extra=TrainFlags)
    if replace(flags, allow_hp_change=()) != TrainFlags():
        raise ConfigError(
            "--dry-run, --world-size and --all-ranks are of a training command that does not "
            f"train, and a job is to. Run `{PROG}` with them here; --dry-run of `launch train` "
            "comes before the --."
        )
    return config, flags


def keep_command(config: RunConfig, flags: TrainFlags) -> list[str]:
    """Arguments that train `config` with `flags`, whatever becomes of the YAML it came from.

    They name a copy of the run in its launch folder, written here. Its name is that of its
    contents, so no other submission changes it. Raises LaunchError where it cannot be written.
    """
    content = to_yaml(config).encode()
    name = f"run-{hashlib.sha256(content).hexdigest()[:12]}.yaml"
    path = Path(config.run_dir) / run_folder.LAUNCH / name
    try:
        with atomic_write(path) as stream:
            stream.write(content)
    except OSError as error:
        raise LaunchError(
            f"{path} cannot be written: {error}. Choose a run_dir that you may write to."
        ) from error
    changes = [word for name in flags.allow_hp_change for word in ("--allow-hp-change", name)]
    return ["--config", str(path), *changes]


def is_kept(config: RunConfig, arguments: Sequence[str]) -> bool:
    """Whether the arguments are those of `keep_command`: then the run is as it was submitted."""
    kept = Path(config.run_dir) / run_folder.LAUNCH
    return arguments[:1] == ["--config"] and Path(arguments[1]).parent == kept
