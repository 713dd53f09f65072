"""Checkpoints through megatron.core.dist_checkpointing: any layout writes, any layout reads.

A checkpoint is the folder `step_<n>`. Beside Megatron's shards (weights, moments, generators) it
has `run.json`, `hyperparams.json` (the resolved table) and `config.yaml`, which need neither torch
nor Megatron to read, and the manifest. It is written under a temporary name and renamed when
everything is on the disk and in the manifest.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest

from megatron_completedp.config.sections import CheckpointConfig
from megatron_completedp.core.identity import check_changes, describe
from megatron_completedp.errors import CheckpointError
from megatron_completedp.mcore import store
from megatron_completedp.mcore.checkpoint_info import (
    CheckpointInfo,
    describe_run,
    layout,
    read_info,
    read_table,
)
from megatron_completedp.mcore.engine import Engine
from megatron_completedp.mcore.manifest import verify, write_manifest
from megatron_completedp.mcore.optimizer import check_live_values
from megatron_completedp.mcore.random_state import random_state, restore_random_state
from megatron_completedp.mcore.save_request import (
    all_or_none,
    collect_digests,
    plan_request,
    write_here,
)
from megatron_completedp.mcore.sharded_state import (
    bare_models,
    content_metadata,
    data_parallel_group,
    sharded_state,
)


@dataclass(frozen=True)
class Resumption:
    """Where a run was taken up."""

    path: Path | None
    """The checkpoint that was loaded; None for a fresh start."""
    notes: tuple[str, ...]
    """What was skipped and why, and which hyperparameters the user changed."""


@dataclass(frozen=True)
class _Pending:
    """A save that has been planned."""

    step: int
    target: Path
    temporary: Path
    request: AsyncRequest


class Saver:
    """Writes an engine's checkpoints into `folder`, one at a time. All ranks call its methods."""

    def __init__(
        self, engine: Engine, folder: Path, settings: CheckpointConfig, *, config_hash: str
    ) -> None:
        self._engine = engine
        self._folder = folder
        self._settings = settings
        self._config_hash = config_hash
        self._calls = AsyncCallsQueue()
        self._pending: _Pending | None = None

    def save(self) -> Path | None:
        """Write the engine's state; the checkpoint that is complete now.

        In the foreground that is the one asked for. With `checkpoint.asynchronous` a process beside
        training writes a snapshot of this moment, and the one before, if any, has been completed.

        Raises CheckpointError on every rank when any rank could not write; what was written is
        removed and the checkpoints before are untouched.
        """
        finished = self.poll(wait=True)
        pending = self._plan()
        if self._settings.asynchronous:
            # The finalizers stay here: Megatron's queue would call them where no error is shared.
            self._calls.schedule_async_request(pending.request._replace(finalize_fns=[]))
            self._pending = pending
            return finished
        with all_or_none(pending.target, pending.temporary):
            write_here(pending.request)
        return self._complete(pending)

    def poll(self, *, wait: bool = False) -> Path | None:
        """The checkpoint that a background save has just completed; None if none has.

        `wait` waits for a save in progress. Raises CheckpointError as `save` does.
        """
        if self._pending is None or not self._calls.maybe_finalize_async_calls(blocking=wait):
            return None
        pending, self._pending = self._pending, None
        return self._complete(pending)

    def _plan(self) -> _Pending:
        engine = self._engine
        target = store.checkpoint_path(self._folder, engine.step)
        made: list[Path | None] = [None]
        with all_or_none(target, None):
            if dist.get_rank() == 0:
                made[0] = store.start_writing(self._folder)
        dist.broadcast_object_list(made)
        (temporary,) = made
        assert temporary is not None, "rank 0 made the folder or all ranks raised"
        metadata = content_metadata()
        with all_or_none(target, temporary):
            request = plan_request(
                {
                    **sharded_state(engine.chunks, engine.optimizer, metadata, is_loading=False),
                    "random": random_state(engine.device),
                },
                temporary,
                content_metadata={k: v for k, v in metadata.items() if k != "dp_cp_group"},
                forked=self._settings.asynchronous,
            )
            if dist.get_rank() == 0:
                describe_run(engine, temporary, self._config_hash)
        return _Pending(engine.step, target, temporary, request)

    def _complete(self, pending: _Pending) -> Path:
        """End a save whose writers are done: manifest, name, retention."""
        with all_or_none(pending.target, pending.temporary):
            for finalize in pending.request.finalize_fns:
                finalize()
        with all_or_none(pending.target, pending.temporary):
            if dist.get_rank() == 0:
                write_manifest(pending.temporary, collect_digests(pending.temporary))
                store.publish(pending.temporary, pending.target)
        if dist.get_rank() == 0:
            store.tidy(
                pending.target,
                keep_last=self._settings.keep_last,
                keep_every=self._settings.keep_every,
            )
        dist.barrier()
        return pending.target


def resume(engine: Engine, folder: Path, *, allowed: Collection[str] = ()) -> Resumption:
    """Load the newest checkpoint in `folder` that verifies. All ranks call it.

    `allowed` names the hyperparameters that may differ from the saved ones, as `module.field`.
    Raises CheckpointError as `load_checkpoint` does, and when there are checkpoints but none
    verifies: a run never starts afresh without being told to.
    """
    shared: list[Any] = [None]
    if dist.get_rank() == 0:
        store.remove_leftovers(folder)
        shared[0] = (store.list_checkpoints(folder), store.pointer_problem(folder))
    # One listing for all: another could change between two looks, or lag on a network disk.
    dist.broadcast_object_list(shared)
    found, pointer_problem = shared[0]
    notes = [pointer_problem] if pointer_problem else []
    for path in reversed(found):
        problem = shared_problem(path)
        if problem is None:
            return Resumption(path, (*notes, *load_checkpoint(engine, path, allowed=allowed)))
        notes.append(f"skipped {path.name}: {problem}")
    if found:
        raise CheckpointError(
            f"none of the {len(found)} checkpoints in {folder} is whole: {' '.join(notes)} "
            "Restore one from a copy, or move the folder away to start the run afresh."
        )
    return Resumption(None, tuple(notes))


def load_checkpoint(
    engine: Engine, path: Path, *, allowed: Collection[str] = ()
) -> tuple[str, ...]:
    """Load weights, optimizer state, generators and step into `engine`. All ranks call it.

    Returns notes on hyperparameters that differ from the saved ones as `allowed` permits, and on
    generators that stay as seeded because another layout wrote the checkpoint.

    Raises CheckpointError when the checkpoint was written with other hyperparameters, another batch
    size or another optimizer layout, or when the optimizer does not hold the planned values after
    the load.
    """
    info = read_info(path)
    notes = _check_identity(engine, path, info, allowed)
    metadata = dist_checkpointing.load_content_metadata(str(path)) or {}
    metadata["dp_cp_group"] = data_parallel_group()
    wanted = sharded_state(engine.chunks, engine.optimizer, metadata, is_loading=True)
    same_layout = info.layout == layout()
    if same_layout:
        wanted["random"] = random_state(engine.device)
    else:
        notes.append(
            f"written by {info.layout}, resumed by {layout()}: the random generators start from "
            "the run's seed (no layer draws from them unless dropout is on)"
        )
    state = dist_checkpointing.load(wanted, str(path))
    for name, model in bare_models(engine.chunks).items():
        model.load_state_dict(state[name])
    with torch.no_grad():  # the optimizer copies into views of its buffers
        engine.optimizer.load_state_dict(state["optimizer"])
    engine.move_to(info.step)
    engine.loop_state = info.loop
    check_live_values(engine.optimizer, engine.groups, engine.config.schedule)
    if same_layout:
        restore_random_state(state["random"], engine.device)
    return tuple(notes)


def _check_identity(
    engine: Engine, path: Path, info: CheckpointInfo, allowed: Collection[str]
) -> list[str]:
    """Raise CheckpointError unless the checkpoint continues in this engine; notes on changes."""
    batch = engine.config.training.global_batch_size
    if info.samples != info.step * batch:
        raise CheckpointError(
            f"{path} has seen {info.samples} sequences in {info.step} steps; with "
            f"training.global_batch_size = {batch} it would be {info.step * batch}, so the data "
            "would not go on where it stopped. Resume with the batch size it was written with."
        )
    wanted = engine.config.parallel.use_distributed_optimizer
    if info.distributed_optimizer != wanted:
        raise CheckpointError(
            f"{path} was written with use_distributed_optimizer = {info.distributed_optimizer}; "
            f"this run has {wanted}, and Megatron cannot convert between the two. Resume with "
            f"parallel.use_distributed_optimizer = {info.distributed_optimizer}."
        )
    try:
        changed = check_changes(read_table(path), engine.resolved.as_json(), allowed)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return [f"hyperparameters changed on request:\n{describe(changed)}"] if changed else []


def shared_problem(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if it verifies. All ranks call it and share work."""
    problem = None
    try:
        verify(path, part=dist.get_rank(), parts=dist.get_world_size())
    except CheckpointError as error:
        problem = str(error)
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next(filter(None, problems), None)
