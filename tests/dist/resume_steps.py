"""Twenty steps at once against ten, a save, a load into a new engine, and ten more."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from megatron_completedp.config.parallel import ParallelConfig
from megatron_completedp.config.sections import CheckpointConfig
from megatron_completedp.mcore.checkpoint import Saver, load_checkpoint
from megatron_completedp.mcore.engine import Engine
from megatron_completedp.mcore.optimizer import optimizer_parts
from megatron_completedp.mcore.store import checkpoint_path
from tests.mcore.engine_runs import batches, run_config, run_engine

STEPS = 20


@dataclass(frozen=True)
class History:
    """What one rank did: a row for each step, and hashes of what it ended with."""

    rows: list[dict[str, Any]]
    end: dict[str, str]


def resumed_and_whole(layout: dict[str, Any]) -> tuple[History, History]:
    """The interrupted run, its two halves joined, and the uninterrupted one, on this rank."""
    config = run_config(ParallelConfig(**layout))
    config = replace(config, training=replace(config.training, train_steps=STEPS))
    shared = [tempfile.mkdtemp(dir=os.environ.get("TMPDIR"))]
    dist.broadcast_object_list(shared)
    folder = Path(shared[0])

    def first_half(engine: Engine) -> History:
        history = _train(engine, STEPS // 2)
        Saver(engine, folder, CheckpointConfig(), config_hash="test").save()
        return history

    def second_half(engine: Engine) -> History:
        load_checkpoint(engine, checkpoint_path(folder, STEPS // 2))
        return _train(engine, STEPS)

    whole, first, second = (
        run_engine(config, stop_at=0, inspect=part)[1]
        for part in (lambda engine: _train(engine, STEPS), first_half, second_half)
    )
    return History(first.rows + second.rows, second.end), whole


def _train(engine: Engine, until: int) -> History:
    ranks = {
        "dp_rank": parallel_state.get_data_parallel_rank(),
        "dp_size": parallel_state.get_data_parallel_world_size(),
    }
    rows = []
    while engine.step < until:
        given = batches(engine.config, engine.step, **ranks)
        # No layer of this model draws numbers, so the generators are moved here, in every step.
        with get_cuda_rng_tracker().fork():
            tracked = torch.rand(1 + dist.get_rank())
        rows.append(
            {
                "result": engine.train_step(given),
                "data": _hash(batch["tokens"] for batch in given),
                "drawn": (torch.rand(1 + dist.get_rank()).tolist(), tracked.tolist()),
            }
        )
    evaluation = engine.evaluate(batches(engine.config, 1000, **ranks))
    (part,) = optimizer_parts(engine.optimizer)
    inner = part.optimizer
    held = inner.param_groups[0]["params"]
    tracker = get_cuda_rng_tracker().get_states()
    end = {
        "evaluation": evaluation.hex(),
        "weights": _hash(item.parameter for item in engine.parameters),
        "masters": _hash(held),
        "exp_avg": _hash(inner.state[tensor]["exp_avg"] for tensor in held),
        "exp_avg_sq": _hash(inner.state[tensor]["exp_avg_sq"] for tensor in held),
        "group": repr({k: v for k, v in inner.param_groups[0].items() if k != "params"}),
        "generators": _hash([torch.get_rng_state(), *(tracker[name] for name in sorted(tracker))]),
    }
    return History(rows, end)


def _hash(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
