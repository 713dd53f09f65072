"""Checkpoints through megatron.core.dist_checkpointing: any layout writes, any layout reads.

A checkpoint is the folder `step_<n>`: Megatron's shards plus `run.json` (step, hashes, versions),
which needs neither torch nor Megatron to read. It is written under a temporary name and renamed
when every rank is done, so a folder with the final name is complete.
"""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import __version__ as megatron_version
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.utils import unwrap_model

import megatron_completedp
from megatron_completedp.errors import CheckpointError
from megatron_completedp.mcore.engine import Engine
from megatron_completedp.mcore.optimizer import check_group_values

INFO_FILE = "run.json"
_NAME = re.compile(r"step_(\d{8})")
_TEMPORARY = ".writing_"


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What `run.json` says."""

    step: int
    """Finished optimizer steps."""
    config_hash: str
    resolved_sha256: str
    """Hash of the resolved per-module table."""
    distributed_optimizer: bool
    """The two optimizer layouts cannot read one another."""
    version: str = megatron_completedp.__version__
    torch: str = torch.__version__
    megatron_core: str = megatron_version


def save_checkpoint(engine: Engine, folder: Path, *, config_hash: str, keep_last: int) -> Path:
    """Write `folder/step_<n>` and delete all but the newest `keep_last`. All ranks call it.

    Returns the checkpoint's path, on every rank after it is complete.
    """
    target = folder / f"step_{engine.step:08d}"
    temporary = folder / f"{_TEMPORARY}{target.name}"
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(leftover)
        temporary.mkdir()
    dist.barrier()
    # Megatron's own queue is for writers in other processes: it lives in a manager process, which
    # takes seconds to start and outlives a run that is killed. Here this process writes and waits.
    filesystem_async._results_queue = queue.Queue()
    metadata = _content_metadata()
    dist_checkpointing.save(
        _state(engine, metadata, is_loading=False),
        str(temporary),
        content_metadata={k: v for k, v in metadata.items() if k != "dp_cp_group"},
    )
    dist.barrier()
    if dist.get_rank() == 0:
        info = CheckpointInfo(
            step=engine.step,
            config_hash=config_hash,
            resolved_sha256=engine.resolved.sha256,
            distributed_optimizer=engine.config.parallel.use_distributed_optimizer,
        )
        _write_synced(temporary / INFO_FILE, json.dumps(asdict(info), indent=1))
        if target.exists():
            shutil.rmtree(target)  # a restarted run reached the same step again
        os.rename(temporary, target)
        for old in list_checkpoints(folder)[:-keep_last]:
            shutil.rmtree(old)
    dist.barrier()
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def read_info(path: Path) -> CheckpointInfo:
    """The `run.json` of one checkpoint. Raises CheckpointError when it is missing or garbled."""
    try:
        return CheckpointInfo(**json.loads((path / INFO_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path / INFO_FILE} cannot be read ({error}); the checkpoint is not whole. Remove its "
            "folder to resume from the one before it."
        ) from error


def load_checkpoint(engine: Engine, path: Path) -> None:
    """Load weights, optimizer state and step into `engine`. All ranks call it.

    Raises CheckpointError when the checkpoint was written with other hyperparameters or another
    optimizer layout, or when a loaded group does not hold the planned values.
    """
    info = read_info(path)
    if info.resolved_sha256 != engine.resolved.sha256:
        raise CheckpointError(
            f"{path} was written with resolved hyperparameters {info.resolved_sha256[:12]}; this "
            f"run's are {engine.resolved.sha256[:12]}. Compare `plan.json` of the two runs, and "
            "resume with the configuration it was written with."
        )
    wanted = engine.config.parallel.use_distributed_optimizer
    if info.distributed_optimizer != wanted:
        raise CheckpointError(
            f"{path} was written with use_distributed_optimizer = {info.distributed_optimizer}; "
            f"this run has {wanted}, and Megatron cannot convert between the two. Resume with "
            f"parallel.use_distributed_optimizer = {info.distributed_optimizer}."
        )
    metadata = dist_checkpointing.load_content_metadata(str(path)) or {}
    metadata["dp_cp_group"] = _data_parallel_group()
    state = dist_checkpointing.load(_state(engine, metadata, is_loading=True), str(path))
    for name, model in _bare_models(engine).items():
        model.load_state_dict(state[name])
    with torch.no_grad():  # the optimizer copies into views of its buffers
        engine.optimizer.load_state_dict(state["optimizer"])
    engine.scheduler.num_steps = 0
    engine.scheduler.step(info.step)
    check_group_values(engine.optimizer, engine.groups, engine.config.schedule)


def _state(engine: Engine, metadata: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    models = {
        name: model.sharded_state_dict(metadata=metadata)
        for name, model in _bare_models(engine).items()
    }
    optimizer = engine.optimizer.sharded_state_dict(
        models, is_loading=is_loading, metadata=metadata
    )
    return {**models, "optimizer": optimizer}


def _bare_models(engine: Engine) -> dict[str, Any]:
    """The GPTModel of each chunk, unwrapped, by its name in the checkpoint."""
    chunks = unwrap_model(engine.chunks)
    if len(chunks) == 1:
        return {"model": chunks[0]}
    return {f"model{index}": chunk for index, chunk in enumerate(chunks)}


def _content_metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": _data_parallel_group(),
    }


def _data_parallel_group() -> dist.ProcessGroup:
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
