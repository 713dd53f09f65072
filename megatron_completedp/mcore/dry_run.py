"""Build every rank of a run in one process, without its GPUs, and account for each parameter.

torch's fake process group answers for the absent ranks and meta tensors hold no data, so the real
GPTModel of a 2,048-rank run can be built and labelled on a laptop.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_completedp.config.parallel import ParallelConfig, check_layout
from megatron_completedp.core.hyperparams import ResidualMultiplier
from megatron_completedp.core.shape import ModelShape
from megatron_completedp.errors import ConfigError
from megatron_completedp.mcore.classify import classify_model
from megatron_completedp.mcore.inventory import (
    Inventory,
    check_inventory,
    inventory,
    sum_inventories,
)
from megatron_completedp.mcore.model import LanguageModel, build_model
from megatron_completedp.mcore.platform import CpuPlatform


@dataclass(frozen=True, kw_only=True)
class DryRunReport:
    """What a dry run built; it exists only when every check passed."""

    world_size: int
    """Ranks of the simulated run; all of them are accounted for."""
    ranks_built: int
    """Ranks whose model was built; the others are data-parallel replicas of them."""
    min_parameters: int
    """Elements on the emptiest rank, tied copies included."""
    max_parameters: int
    """Elements on the fullest rank."""
    total_parameters: int
    """Elements of the whole model, each counted once."""
    seconds: float
    """Wall time of the dry run."""

    def describe(self) -> str:
        """One line for the log."""
        return (
            f"dry run: {self.world_size:,} ranks covered by {self.ranks_built:,} built, "
            f"{self.min_parameters:,} to {self.max_parameters:,} parameters per rank, "
            f"{self.total_parameters:,} in all, {self.seconds:.1f} s"
        )


def dry_run(
    shape: ModelShape, parallel: ParallelConfig, *, world_size: int, all_ranks: bool = False
) -> DryRunReport:
    """Build and label the model of every rank of a run, and check that nothing is lost.

    Data-parallel replicas hold the same model by construction: the layers and shards of a rank
    depend on its TP and PP coordinate alone. One replica is therefore built, and Megatron's own
    data-parallel groups say which ranks each of its coordinates stands for; together they must
    be all ranks. `all_ranks` builds each replica as well (same checks, DP times the work).

    No GPU is touched: the process becomes a CPU process (see `CpuPlatform.install`), also where
    there is one, so do not train in it afterwards.

    Args:
        shape: the whole model.
        parallel: how it is split.
        world_size: ranks of the run, a multiple of TP x PP.
        all_ranks: build data-parallel replicas too.

    Raises:
        ConfigError: the layout does not fit, or torch.distributed is in use in this process.
        ClassificationError: a parameter has no module, or a replica's sum is not the model.

    """
    started = time.monotonic()
    check_layout(shape, parallel)
    if world_size < 1 or world_size % parallel.model_parallel_size:
        raise ConfigError(
            f"world_size is {world_size}; expected a multiple of tensor x pipeline parallel size "
            f"= {parallel.model_parallel_size}. Change it or the parallel sizes."
        )
    if dist.is_initialized():
        raise ConfigError(
            "torch.distributed is initialized in this process; a dry run simulates a world of its "
            "own. Run it in a fresh process, or before initializing."
        )
    CpuPlatform().install()
    with simulated_rank(0, world_size, parallel):
        replica = dist.get_process_group_ranks(parallel_state.get_model_parallel_group())
    covered: list[int] = []
    sizes: list[int] = []
    replicas: dict[int, dict[tuple[int, int], Inventory]] = {}
    for rank in range(world_size) if all_ranks else replica:
        with simulated_rank(rank, world_size, parallel):
            chunks = build_on_meta(shape, parallel)
            parameters = classify_model(chunks, shape, parallel)
            data_group = parallel_state.get_data_parallel_group()
            dp_rank = parallel_state.get_data_parallel_rank()
            pp_rank = parallel_state.get_pipeline_model_parallel_rank()
            tp_rank = parallel_state.get_tensor_model_parallel_rank()
            covered += [rank] if all_ranks else dist.get_process_group_ranks(data_group)
        sizes.append(sum(item.parameter.numel() for item in parameters))
        replicas.setdefault(dp_rank, {})[pp_rank, tp_rank] = inventory(parameters)
    assert sorted(covered) == list(range(world_size)), "data-parallel groups do not tile the world"
    for ranks in replicas.values():
        total = sum_inventories(ranks)
        check_inventory(total, shape)
    return DryRunReport(
        world_size=world_size,
        ranks_built=len(sizes),
        min_parameters=min(sizes),
        max_parameters=max(sizes),
        total_parameters=sum(total.values()),
        seconds=time.monotonic() - started,
    )


@contextmanager
def simulated_rank(rank: int, world_size: int, parallel: ParallelConfig) -> Iterator[None]:
    """Be `rank` of `world_size` inside the block; no process group or seed is left behind.

    Layers read their shard from the process groups themselves, not from parallel_state's rank
    overrides, so every rank gets groups of its own: 0.3 to 0.6 s at 2,048 ranks. Collectives
    inside the block return at once and move nothing.
    """
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        parallel_state.initialize_model_parallel(
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            parallel.virtual_pipeline_model_parallel_size,
            create_gloo_process_groups=False,
        )
        with torch.random.fork_rng(devices=[]):
            # Megatron's layers fork this RNG when they are constructed, also on meta.
            tensor_parallel.model_parallel_cuda_manual_seed(0)
            yield
    finally:
        tensor_parallel.get_cuda_rng_tracker().reset()
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def build_on_meta(shape: ModelShape, parallel: ParallelConfig) -> list[LanguageModel]:
    """Build the current rank's model chunks without data: names, shapes and TP marks only.

    Layers are the local ones also where Transformer Engine is installed: its tensors are split
    alike, and it cannot be counted on to build without a device.
    """
    return build_model(
        shape,
        parallel,
        platform=CpuPlatform(),
        precision="bf16",
        # Multipliers own no parameters, so a model without data may leave them at 1.
        residual=[
            ResidualMultiplier(layer=layer, attention=1.0, mlp=1.0)
            for layer in range(shape.num_layers)
        ],
        device=torch.device("meta"),
    )
