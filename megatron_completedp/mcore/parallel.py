"""Start and stop the process groups of a run."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch.distributed import distributed_c10d

from megatron_completedp.config.parallel import ParallelConfig
from megatron_completedp.errors import ConfigError
from megatron_completedp.mcore.platform import Platform


@dataclass(frozen=True)
class ParallelState:
    """This process's place in the run."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int


def initialize_parallel(
    platform: Platform, parallel: ParallelConfig, *, timeout_s: float, seed: int
) -> ParallelState:
    """Install the platform, start torch.distributed and Megatron's groups, seed the generators.

    Ranks come from torchrun's environment; without it this is a run of one process. An already
    started torch.distributed is used as it is. `timeout_s` bounds every collective. `seed` sets
    the default generators and Megatron's per-TP-rank tracker.

    Raises ConfigError when the world size is not a multiple of TP x PP.
    """
    platform.install()
    started = dist.is_initialized()
    world_size = dist.get_world_size() if started else int(os.environ.get("WORLD_SIZE", "1"))
    replica = parallel.model_parallel_size
    if world_size % replica:
        raise ConfigError(
            f"The run has {world_size} processes, but one model replica takes "
            f"{parallel.tensor_model_parallel_size} (TP) x "
            f"{parallel.pipeline_model_parallel_size} (PP) = {replica}; expected a multiple of "
            f"{replica}. Start {-(-world_size // replica) * replica} processes or lower "
            "tensor_model_parallel_size or pipeline_model_parallel_size."
        )
    if not started:
        _start_process_group(platform, timeout_s)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        distributed_timeout_minutes=timeout_s / 60,  # goes into timedelta(minutes=...)
    )
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return ParallelState(
        rank=dist.get_rank(),
        world_size=world_size,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
    )


def destroy_parallel(*, keep_process_group: bool = False) -> None:
    """Drop every process group, but the default one if `keep_process_group`.

    Keep it to set up another layout in the same processes: a second start would race for the port.
    """
    if dist.is_initialized() and keep_process_group:
        # Megatron only forgets its groups, and the optimizer's own are in no list of it; each would
        # keep three threads that wake up all the time.
        for group in list(distributed_c10d._world.pg_map):
            if group is not dist.group.WORLD:
                dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()
    if dist.is_initialized() and not keep_process_group:
        dist.destroy_process_group()
    # A group's threads end with its last reference: models hold theirs in cycles, and the rotary
    # embedding's cache holds the embedding.
    RotaryEmbedding.forward.cache_clear()
    gc.collect()


def _start_process_group(platform: Platform, timeout_s: float) -> None:
    timeout = timedelta(seconds=timeout_s)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(platform.backend, timeout=timeout)
    else:
        dist.init_process_group(
            platform.backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
        )
