"""What a checkpoint says about itself in files that need neither torch nor Megatron to read."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import __version__ as megatron_version
from megatron.core import parallel_state

import megatron_completedp
from megatron_completedp.config.load import to_yaml
from megatron_completedp.errors import CheckpointError
from megatron_completedp.mcore.engine import Engine
from megatron_completedp.mcore.store import list_checkpoints

INFO_FILE = "run.json"
TABLE_FILE = "hyperparams.json"
CONFIG_FILE = "config.yaml"


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What `run.json` says."""

    step: int
    """Finished optimizer steps."""
    samples: int
    """Training sequences consumed: where the data goes on."""
    layout: str
    """Sizes of the parallel dimensions it was written by; equal ones restore the generators."""
    loop: dict[str, Any]
    """What the training loop keeps from step to step."""
    config_hash: str
    resolved_sha256: str
    """Hash of the resolved per-module table in `hyperparams.json`."""
    distributed_optimizer: bool
    """The two optimizer layouts cannot read one another."""
    version: str
    """Of this package."""
    commit: str | None
    """Git commit of this package, with -dirty for local changes; None outside a checkout."""
    python: str
    torch: str
    megatron_core: str


def find_checkpoint(path: Path) -> Path:
    """The checkpoint `path`, or the newest one of the run folder or checkpoint folder `path`.

    Raises CheckpointError when there is none.
    """
    if (path / TABLE_FILE).is_file():
        return path
    found = list_checkpoints(path / "checkpoints") or list_checkpoints(path)
    if not found:
        raise CheckpointError(
            f"{path} holds no checkpoint; expected the folder of a run, one step_<n> of its "
            "checkpoints, or a folder made by tools/convert_checkpoint.py from-hf."
        )
    return found[-1]


def read_table(path: Path) -> dict[str, Any]:
    """The resolved table, as `Resolved.as_json`, that the checkpoint `path` was written with."""
    table: dict[str, Any] = json.loads((path / TABLE_FILE).read_text(encoding="utf-8"))
    return table


def read_info(path: Path) -> CheckpointInfo:
    """The `run.json` of one checkpoint. Raises CheckpointError when it is missing or garbled."""
    try:
        return CheckpointInfo(**json.loads((path / INFO_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path / INFO_FILE} cannot be read ({error}); the checkpoint is not whole, or another "
            "version wrote it. Remove its folder to resume from the one before it."
        ) from error


def describe_run(engine: Engine, folder: Path, config_hash: str) -> None:
    """Write into `folder` what people and a resuming run must know before any shard is read.

    Raises OSError when it cannot be written.
    """
    info = CheckpointInfo(
        step=engine.step,
        samples=engine.step * engine.config.training.global_batch_size,
        layout=layout(),
        loop=engine.loop_state,
        config_hash=config_hash,
        resolved_sha256=engine.resolved.sha256,
        distributed_optimizer=engine.config.parallel.use_distributed_optimizer,
        version=megatron_completedp.__version__,
        commit=_commit(),
        python=platform.python_version(),
        torch=torch.__version__,
        megatron_core=megatron_version,
    )
    texts = {
        INFO_FILE: json.dumps(asdict(info), indent=1),
        TABLE_FILE: json.dumps(engine.resolved.as_json(), indent=1),
        CONFIG_FILE: to_yaml(engine.config),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def layout() -> str:
    """The sizes of the parallel dimensions, for people; equal ones mean an equal layout."""
    pp = parallel_state.get_pipeline_model_parallel_world_size()
    chunks = parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1
    tp = parallel_state.get_tensor_model_parallel_world_size()
    return f"TP{tp} x PP{pp} x VPP{chunks} on {dist.get_world_size()} ranks"


@cache
def _commit() -> str | None:
    """The commit of the checkout that this package is imported from."""
    root = Path(megatron_completedp.__file__).parents[1]
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return None
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    command = [git, "-C", str(root), *describe]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return done.stdout.strip() or None
