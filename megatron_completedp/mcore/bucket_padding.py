"""Read the right elements when Megatron gathers a sharded optimizer's state for a checkpoint.

Megatron-Core up to 0.19 strips the padding at the end of each bucket while it gathers, and then
cuts the result at offsets that still count it: behind the first bucket every parameter would be
saved with its neighbours' masters and moments, and the last ones partly with zeros. A buffer has
several buckets where gradients overlap and a rank holds more than 40M elements.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron.core.optimizer import DistributedOptimizer, MegatronOptimizer

from megatron_completedp.mcore.optimizer import optimizer_parts


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
