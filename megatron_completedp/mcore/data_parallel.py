"""Megatron's data parallelism around a model: wrap its chunks, and tell the schedules of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import Float16Module

from megatron_completedp.config.parallel import ParallelConfig
from megatron_completedp.mcore.model import LanguageModel


def wrap_chunks(
    chunks: Sequence[LanguageModel], parallel: ParallelConfig
) -> list[DistributedDataParallel]:
    """Mixed precision, then Megatron's data parallelism, around each model chunk."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
    )
    wrapped = []
    for index, chunk in enumerate(chunks):
        module = Float16Module(chunk.config, chunk) if chunk.config.bf16 else chunk
        wrapped.append(
            DistributedDataParallel(
                chunk.config,
                ddp_config,
                module,
                # The last stages' gradients are ready first; one bucket is enough for later chunks.
                disable_bucketing=index > 0,
            )
        )
    return wrapped


def connect_schedules(
    chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    parallel: ParallelConfig,
) -> None:
    """Tell Megatron's schedules how to scale the loss and to reduce the gradients of `chunks`."""
    config = chunks[0].config
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    if parallel.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]


@contextmanager
def synchronous_parameters(
    chunks: Sequence[DistributedDataParallel], parallel: ParallelConfig
) -> Iterator[None]:
    """Gather parameters now where training would gather them during the forward pass."""
    if not parallel.overlap_param_gather:
        yield
        return
    for chunk in chunks:
        chunk.disable_forward_pre_hook()
    try:
        yield
    finally:
        for chunk in chunks:
            chunk.enable_forward_pre_hook()
