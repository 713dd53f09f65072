"""What a checkpoint holds of one rank, and where each tensor lies in the whole model.

Megatron-Core up to 0.19 strips the padding at the end of each bucket while it gathers a sharded
optimizer's state, and then cuts the result at offsets that still count it: behind the first bucket
every parameter would be saved with its neighbours' masters and moments, and the last ones partly
with zeros. A buffer has several buckets where gradients overlap and a rank holds more than 40M
elements. `offsets_without_padding` puts this right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import DistributedOptimizer, MegatronOptimizer
from megatron.core.utils import unwrap_model

from megatron_completedp.mcore.optimizer import optimizer_parts


def sharded_state(
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    metadata: dict[str, Any],
    *,
    is_loading: bool,
) -> dict[str, Any]:
    """Weights and optimizer state of this rank, each tensor with its place in the whole model.

    `is_loading` asks for the places alone: the optimizer's tensors are then empty.
    """
    models = {
        name: model.sharded_state_dict(metadata=metadata)
        for name, model in bare_models(chunks).items()
    }
    with offsets_without_padding(optimizer):
        state = optimizer.sharded_state_dict(models, is_loading=is_loading, metadata=metadata)
    return {**models, "optimizer": state}


def bare_models(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """The GPTModel of each chunk, unwrapped, by its name in the checkpoint."""
    bare = unwrap_model(list(chunks))
    if len(bare) == 1:
        return {"model": bare[0]}
    return {f"model{index}": chunk for index, chunk in enumerate(bare)}


def content_metadata() -> dict[str, Any]:
    """How the state is laid out, for Megatron and for who loads the checkpoint."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": data_parallel_group(),
    }


def data_parallel_group() -> dist.ProcessGroup:
    """The ranks that share this rank's optimizer state."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


@contextmanager
def offsets_without_padding(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Inside the block, parameters' offsets are those in the gathered state; save inside it.

    Nothing else may use the buffers meanwhile: they hold the gradients at the usual offsets.
    """
    buffers = [
        buffer
        for part in optimizer_parts(optimizer)
        if isinstance(part, DistributedOptimizer)
        for buffer in part.buffers
    ]
    usual = [buffer.param_index_map for buffer in buffers]
    try:
        for buffer in buffers:
            stripped = [0]  # elements of padding before each bucket
            for bucket in buffer.buckets:
                stripped.append(stripped[-1] + bucket.grad_data.numel() - bucket.numel_unpadded)
            buffer.param_index_map = {
                parameter: (start - stripped[bucket], stop - stripped[bucket], bucket)
                for parameter, (start, stop, bucket) in buffer.param_index_map.items()
            }
        yield
    finally:
        for buffer, offsets in zip(buffers, usual, strict=True):
            buffer.param_index_map = offsets
