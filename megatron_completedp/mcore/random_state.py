"""The random generators of this rank, as one object of a sharded checkpoint."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.tensor_parallel import get_cuda_rng_tracker


def random_state(device: torch.device) -> ShardedObject:
    """The states of torch's default generators and of Megatron's tracker, to save or to load into.

    Every rank has its own, so only an equal layout can take them back.
    """
    state: dict[str, Any] = {
        "cpu": torch.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return ShardedObject(
        key="random",
        data=state,
        global_shape=(dist.get_world_size(),),
        global_offset=(dist.get_rank(),),
    )


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put the states of `random_state` back, bit for bit."""
    get_cuda_rng_tracker().set_states(state["tracker"])
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
