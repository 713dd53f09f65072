"""Saves and resumes across layouts, run by `harness`; compared in test_checkpoint.py.

The cases of one test module share the folder that COMPLETEDP_TEST_FOLDER names: what one set of
processes saves, a set of another size resumes.
"""

from __future__ import annotations

import hashlib
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_completedp.config.parallel import ParallelConfig
from megatron_completedp.config.sections import CheckpointConfig
from megatron_completedp.errors import CheckpointError
from megatron_completedp.mcore.checkpoint import Saver, load_checkpoint, resume
from megatron_completedp.mcore.engine import Engine
from megatron_completedp.mcore.store import checkpoint_path
from tests.dist.engine_cases import LAYOUTS
from tests.mcore.engine_runs import Trace, batches, run_config, run_engine

#: Steps after which the chain 1 process -> a layout -> 1 process changes hands.
FIRST, SECOND = 4, 6


def __getattr__(name: str) -> Any:
    """Cases are named `KIND_LAYOUT`, e.g. `start_one` or `there_tp2`; the kinds are below."""
    kind, _, layout = name.partition("_")
    cases = {
        "whole": _whole,
        "start": _start,
        "there": _there,
        "back": _back,
        "random": _random,
        "background": _background,
    }
    if kind in cases:
        return lambda: cases[kind](layout)
    raise AttributeError(name)


def folder(name: str) -> Path:
    return Path(os.environ["COMPLETEDP_TEST_FOLDER"]) / name


def config(layout: str) -> Any:
    return run_config(ParallelConfig(**LAYOUTS[layout]))


def alone(layout: str) -> str:
    """The one-process layout that shares its optimizer's format."""
    return "one_sharded" if "sharded" in layout else "one"


def _whole(layout: str) -> Trace:
    return run_engine(config(layout))[0]


def _start(layout: str) -> Trace:
    return run_engine(config(layout), stop_at=FIRST, save_to=folder(layout))[0]


def _there(layout: str) -> Trace:
    return run_engine(
        config(layout),
        resume_from=checkpoint_path(folder(alone(layout)), FIRST),
        stop_at=SECOND,
        save_to=folder(layout),
    )[0]


def _back(layout: str) -> Trace:
    path = checkpoint_path(folder(layout), SECOND)
    return run_engine(config(alone(layout)), resume_from=path)[0]


def _random(layout: str) -> dict[str, Any]:
    """What the generators draw after a save, and after the load of it in a new engine."""
    path = folder(f"random_{layout}")

    def save(engine: Engine) -> list[torch.Tensor]:
        torch.rand(3 + dist.get_rank())  # no two ranks alike
        with get_cuda_rng_tracker().fork():
            torch.rand(3)
        Saver(engine, path, CheckpointConfig(), config_hash="test").save()
        return draws()

    def load(engine: Engine) -> dict[str, Any]:
        fresh = draws()
        load_checkpoint(engine, checkpoint_path(path, 1))
        return {"fresh": fresh, "loaded": draws()}

    _, saved = run_engine(config(layout), stop_at=1, inspect=save)
    _, after = run_engine(config(layout), stop_at=0, inspect=load)
    return {"saved": saved, **after}


def draws() -> list[torch.Tensor]:
    with get_cuda_rng_tracker().fork():
        tracked = torch.rand(5)
    return [torch.rand(5), tracked]


def _background(layout: str) -> list[dict[str, str]]:
    """Hashes of the shards of one step, saved in the foreground and beside further training."""

    def save(engine: Engine) -> list[dict[str, str]]:
        found = []
        for asynchronous in (False, True):
            path = folder(f"background_{layout}_{asynchronous}")
            settings = CheckpointConfig(asynchronous=asynchronous)
            saver = Saver(engine, path, settings, config_hash="test")
            ready = saver.save()
            assert (ready is None) == asynchronous
            if asynchronous:
                # The live tensors move on while the snapshot is being written.
                assert list(path.glob("step_*")) == []
                train_one_step(engine)
                ready = saver.poll(wait=True)
                assert saver.poll() is None
            assert ready == checkpoint_path(path, FIRST)
            found.append(shard_hashes(ready))
        return found

    return run_engine(config(layout), stop_at=FIRST, inspect=save)[1]


def train_one_step(engine: Engine) -> None:
    ranks = {
        "dp_rank": parallel_state.get_data_parallel_rank(),
        "dp_size": parallel_state.get_data_parallel_world_size(),
    }
    engine.train_step(batches(engine.config, engine.step, **ranks))


def shard_hashes(path: Path) -> dict[str, str]:
    shards = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in path.glob("*.distcp")}
    assert shards
    return shards


def full_disk() -> dict[str, Any]:
    """Saves during which one rank's files may not grow, in the foreground and in the background.

    On rank 1 that ends a shard; on rank 0 also every file that rank 0 alone writes.
    """
    path = folder("full_disk")

    def save(engine: Engine) -> dict[str, Any]:
        Saver(engine, path, CheckpointConfig(), config_hash="test").save()
        train_one_step(engine)
        kept = contents(path)
        dist.barrier()
        messages = []
        # Too little for the first file of rank 0, and for a shard of either rank.
        for limited, size in ((0, 1000), (0, 200_000), (1, 200_000)):
            for asynchronous in (False, True):
                settings = replace(CheckpointConfig(), asynchronous=asynchronous)
                saver = Saver(engine, path, settings, config_hash="test")
                with file_size_limit(size if dist.get_rank() == limited else None):
                    messages.append(failure(saver))
                dist.barrier()
                assert contents(path) == kept, "nothing left, nothing touched"
                dist.barrier()
        resumed = resume(engine, path)
        train_one_step(engine)
        again = Saver(engine, path, CheckpointConfig(), config_hash="test").save()
        return {"messages": messages, "resumed": resumed.path, "again": again}

    return run_engine(config("tp2"), stop_at=1, inspect=save)[1]


def failure(saver: Saver) -> str:
    try:
        saver.save()
        saver.poll(wait=True)
    except CheckpointError as error:
        return str(error)
    return "no failure"


def contents(path: Path) -> dict[str, int]:
    return {str(p.relative_to(path)): p.stat().st_size for p in path.rglob("*")}


@contextmanager
def file_size_limit(size: int | None) -> Iterator[None]:
    """Writes beyond `size` bytes of a file fail in this process and those it starts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
