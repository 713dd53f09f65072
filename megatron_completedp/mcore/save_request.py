"""The way through megatron.core.dist_checkpointing's save on which no rank waits for a failed one.

Megatron's own way plans, writes and finishes in one call, and a full disk under one of the files
that rank 0 alone writes would leave the other ranks in a collective. Here the call is taken apart,
by the request that Megatron makes for asynchronous saves, and after each part all ranks agree.
"""

from __future__ import annotations

import inspect
import json
import pickle
import queue
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import common, filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from torch.distributed.checkpoint.api import CheckpointException

from megatron_completedp.errors import CheckpointError
from megatron_completedp.mcore.manifest import FileRecord, seal
from megatron_completedp.mcore.store import discard

#: What a full disk, a quota or a read-only folder raises; torch.save turns OSError into the second.
_WRITE_ERRORS = (OSError, RuntimeError)

#: What rank 0 alone writes amid the collectives; 0.19 has no common file any more.
_RANK_ZERO_WRITES: list[tuple[Any, str]] = [
    (filesystem_async.FileSystemWriterAsync, "finish"),
    (serialization, "save_config"),
]
if hasattr(common, "TorchCommonSaveStrategy"):
    _RANK_ZERO_WRITES.append((common.TorchCommonSaveStrategy, "save_common"))


class ForkedResults:
    """A queue of one item from a forked process to this one, as Megatron's writers want it.

    Megatron's own lives in a manager process, which takes seconds to start and outlives a run that
    is killed; a pipe would block the writer once its results are larger than the pipe.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the save

    def put(self, results: object) -> None:
        """Leave `results`; the forked process calls it once."""
        self._file.write(pickle.dumps(results))
        self._file.flush()

    def get_nowait(self) -> Any:
        """The results. Raises queue.Empty when the process ended without leaving any."""
        self._file.seek(0)
        content = self._file.read()
        if not content:
            raise queue.Empty
        return pickle.loads(content)


def plan_request(
    state: dict[str, Any], folder: Path, *, content_metadata: dict[str, Any], forked: bool
) -> AsyncRequest:
    """Agree on who writes what of the sharded `state` into `folder`. All ranks call it.

    `forked` says whether another process will do the writing. The request's function writes this
    rank's files and leaves their digests; its finalizers have collectives and end the save.
    """
    filesystem_async._results_queue = ForkedResults() if forked else queue.Queue()
    # Since 0.19 the default is a package of NVIDIA's; the built-in writer is in every version.
    choice = inspect.signature(dist_checkpointing.save).parameters
    request = dist_checkpointing.save(
        state,
        str(folder),
        async_sharded_save=True,
        content_metadata=content_metadata,
        **({"async_strategy": "mcore"} if "async_strategy" in choice else {}),
    )
    if request.async_fn is None:  # this rank has nothing to write
        return request
    return request._replace(
        async_fn=partial(_write_and_digest, request.async_fn, folder, dist.get_rank())
    )


def write_here(request: AsyncRequest) -> None:
    """Write this rank's files in this process. Failures wait for the finalizers."""
    if request.async_fn is not None:
        arguments = list(request.async_fn_args)
        arguments[1] = request.preload_fn()  # the tensors, moved to the host
        request.async_fn(*arguments, **request.async_fn_kwargs)


@contextmanager
def all_or_none(target: Path, temporary: Path | None) -> Iterator[None]:
    """A part of saving `target` that succeeds on every rank or raises CheckpointError on every one.

    All ranks must enter. After a failure the folder `temporary` is removed.
    """
    errors: list[str] = []
    with _rank_zero_errors_kept(errors):
        try:
            yield
        except CheckpointException as error:
            # Megatron raises it on all ranks, with the causes on rank 0.
            errors += [_say(cause, rank) for rank, (cause, _) in error.failures.items()]
        except _WRITE_ERRORS as error:
            errors.append(_say(error, dist.get_rank()))
    free = shutil.disk_usage(target.parent).free if target.parent.exists() else 0
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (errors, free))
    if any(texts for texts, _ in gathered):
        if dist.get_rank() == 0 and temporary is not None:
            discard(temporary)
        failures = "; ".join(text for texts, _ in gathered for text in texts)
        raise CheckpointError(
            f"{target} could not be written ({failures}); its disk has {gathered[0][1] >> 20} MiB "
            "free. Checkpoints written before are as they were. Make room, or the folder writable, "
            "and start the run again."
        )


def collect_digests(folder: Path) -> dict[str, FileRecord]:
    """The record of every file in `folder`, all of them on the disk. Raises OSError.

    Each rank has left the digests of its own files; the few others are read here.
    """
    records: dict[str, FileRecord] = {}
    for path in folder.glob("digests_*.json"):
        with suppress(ValueError):  # torn, on a disk that was full for a moment
            content = json.loads(path.read_bytes())
            records |= {name: FileRecord(**entry) for name, entry in content.items()}
        path.unlink()
    others = [path for path in folder.iterdir() if path.name not in records]
    return records | {path.name: seal(path) for path in others}


def _write_and_digest(
    write: Callable[..., None], folder: Path, rank: int, *args: Any, **kwargs: Any
) -> None:
    write(*args, **kwargs)
    # Here, because in a process beside training the hash costs training nothing.
    with suppress(OSError):  # rank 0 reads what is missing, and reports
        digests = {path.name: asdict(seal(path)) for path in folder.glob(f"__{rank}_*.distcp")}
        (folder / f"digests_{rank}.json").write_text(json.dumps(digests), encoding="utf-8")


@contextmanager
def _rank_zero_errors_kept(errors: list[str]) -> Iterator[None]:
    """Inside the block, a failing write of rank 0 goes to `errors` and Megatron carries on."""
    originals = [getattr(owner, name) for owner, name in _RANK_ZERO_WRITES]

    def kept(write: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any, **kwargs: Any) -> None:
            try:
                write(*args, **kwargs)
            except _WRITE_ERRORS as error:
                errors.append(_say(error, rank=0))

        return call

    try:
        for (owner, name), original in zip(_RANK_ZERO_WRITES, originals, strict=True):
            setattr(owner, name, kept(original))
        yield
    finally:
        for (owner, name), original in zip(_RANK_ZERO_WRITES, originals, strict=True):
            setattr(owner, name, original)


def _say(error: BaseException, rank: int) -> str:
    """What happened where, without what torch writes below it."""
    return f"rank {rank}: {(str(error) or type(error).__name__).splitlines()[0]}"
