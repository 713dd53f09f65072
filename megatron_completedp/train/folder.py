"""The folder of a run: who owns it, and the resolved configuration and plan inside."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import count
from pathlib import Path

from megatron_completedp.config.load import config_hash, load_config, to_yaml
from megatron_completedp.config.run import RunConfig
from megatron_completedp.core.budget import Budget
from megatron_completedp.core.hyperparams import Resolved
from megatron_completedp.data.atomic import atomic_write
from megatron_completedp.errors import ConfigError
from megatron_completedp.plan.run_plan import Plan

CONFIG_FILE = "config.yaml"
PLAN_JSON = "plan.json"
PLAN_TEXT = "plan.txt"
METRICS_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
#: There while, and only while, the run waits to be started again after a signal stopped it. The
#: exit code says so too, but torchrun replaces it with its own.
REQUEUE_FILE = "requeue"
#: What launchers keep: logs and the count of starts. They write before the run itself does.
LAUNCH = "launch"


def claim(config: RunConfig, *, may_change_hyperparams: bool = False) -> Path:
    """Create the run's folder, or take it up again if it holds this same run.

    With `may_change_hyperparams` the run may have other hyperparameters, multipliers and rules than
    before; loading its checkpoint then compares them number by number.

    Raises ConfigError when it holds another run or something that is no run at all, and when it
    cannot be made.
    """
    folder = Path(config.run_dir)
    written = folder / CONFIG_FILE
    if written.exists():
        other = load_config(written)
        if may_change_hyperparams:
            other = replace(
                other,
                hyperparams=config.hyperparams,
                multipliers=config.multipliers,
                rules=config.rules,
            )
        if config_hash(other) != config_hash(config):
            raise ConfigError(
                f"run_dir {folder} already holds another run: its {CONFIG_FILE} differs from this "
                "configuration. Choose another run_dir, or restore the configuration to resume it "
                "(--allow-hp-change lets hyperparameters differ)."
            )
    elif folder.is_dir() and any(path.name != LAUNCH for path in folder.iterdir()):
        raise ConfigError(
            f"run_dir {folder} is not empty and holds no {CONFIG_FILE}; nothing in it is "
            "overwritten. Choose a new or empty folder."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"run_dir {folder} cannot be made: {error}. Choose a folder that you may write to."
        ) from error
    return folder


def write_plan(folder: Path, config: RunConfig, resolved: Resolved, budget: Budget) -> None:
    """Write the resolved config and the per-module table, each file whole or not at all.

    config.yaml comes first: it marks the folder as this run's, so that a start which is killed here
    can be repeated. Where it described other hyperparameters, it is kept as config.<n>.yaml.
    """
    written = folder / CONFIG_FILE
    if written.exists() and config_hash(load_config(written)) != config_hash(config):
        numbered = (folder / f"config.{number}.yaml" for number in count(1))
        kept = next(path for path in numbered if not path.exists())
        _replace(kept, written.read_text(encoding="utf-8"))
    _replace(written, to_yaml(config))
    _replace(folder / PLAN_JSON, json.dumps(resolved.as_json(), indent=1))
    _replace(folder / PLAN_TEXT, f"{Plan(config, resolved, budget)}\n")


def ask_for_requeue(folder: Path, message: str) -> None:
    """Leave the file that tells launchers to start this run again; `message` says why."""
    _replace(folder / REQUEUE_FILE, f"{message}\n")


def withdraw_requeue(folder: Path) -> None:
    """The run was started again: the request is met, even if this start should fail."""
    (folder / REQUEUE_FILE).unlink(missing_ok=True)


def _replace(path: Path, text: str) -> None:
    with atomic_write(path) as stream:
        stream.write(text.encode())
