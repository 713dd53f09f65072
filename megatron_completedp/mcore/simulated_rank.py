"""Be one rank of a large run in this process, without the others and without data.

torch's fake process group answers for the absent ranks, and meta tensors have shapes alone, so what
a rank of a 2,048-rank run builds can be built on a laptop by the code that would build it there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_completedp.config.parallel import ParallelConfig
from megatron_completedp.core.hyperparams import ResidualMultiplier
from megatron_completedp.core.shape import ModelShape
from megatron_completedp.mcore.model import LanguageModel, Precision, build_model
from megatron_completedp.mcore.platform import CpuPlatform

_RANK_GROUPS = "generate_masked_orthogonal_rank_groups"
_rank_groups = getattr(parallel_state, _RANK_GROUPS)
_create_group = parallel_state.create_group


@contextmanager
def simulated_rank(rank: int, world_size: int, parallel: ParallelConfig) -> Iterator[None]:
    """Be `rank` of `world_size` inside the block; no process group or seed is left behind.

    Layers read their shard from the process groups themselves, not from parallel_state's rank
    overrides, so every rank gets groups of its own. Collectives inside the block return at once;
    they move nothing, or give every rank what this one has.
    """
    # torch's hook for uncaught errors names the rank, and each start would add one.
    with replaced(sys, "excepthook", sys.excepthook):
        dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
        try:
            with (
                replaced(dist, "new_group", _own_groups_alone(rank)),
                # What follows is for speed alone: thousands of groups, for every rank anew.
                replaced(parallel_state, "create_group", _skip_groups_of_others(rank)),
                replaced(parallel_state, _RANK_GROUPS, _remembered_rank_groups),
            ):
                parallel_state.initialize_model_parallel(
                    parallel.tensor_model_parallel_size,
                    parallel.pipeline_model_parallel_size,
                    parallel.virtual_pipeline_model_parallel_size,
                )
            with torch.random.fork_rng(devices=[]):
                # Megatron's layers fork this RNG when they are constructed, also on meta.
                tensor_parallel.model_parallel_cuda_manual_seed(0)
                yield
        finally:
            tensor_parallel.get_cuda_rng_tracker().reset()
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


@contextmanager
def tensors_without_data() -> Iterator[None]:
    """Make Megatron allocate on `meta` inside the block, and take meta tensors for the CPU's."""
    kind = torch.Tensor.type

    def kind_on_cpu(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = kind(tensor, *args, **kwargs)
        # The optimizers tell precisions apart by torch.BFloat16Tensor and the like.
        return name.replace("torch.meta.", "torch.") if isinstance(name, str) else name

    with (
        replaced(torch.cuda, "current_device", lambda: torch.device("meta")),
        replaced(torch.Tensor, "type", kind_on_cpu),
    ):
        yield


@contextmanager
def replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    """Have `owner.name` be `value` inside the block."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def build_on_meta(
    shape: ModelShape, parallel: ParallelConfig, precision: Precision = "bf16"
) -> list[LanguageModel]:
    """Build the current rank's model chunks without data: names, shapes and TP marks only.

    Layers are the local ones also where Transformer Engine is installed: its tensors are split
    alike, and it cannot be counted on to build without a device.
    """
    return build_model(
        shape,
        parallel,
        platform=CpuPlatform(),
        precision=precision,
        # Multipliers own no parameters, so a model without data may leave them at 1.
        residual=[
            ResidualMultiplier(layer=layer, attention=1.0, mlp=1.0)
            for layer in range(shape.num_layers)
        ],
        device=torch.device("meta"),
    )


def _own_groups_alone(rank: int) -> Any:
    """A dist.new_group that makes the groups `rank` is in, all of them fake, and skips the rest."""
    new_group = dist.new_group

    def own_group(ranks: list[int] | None = None, **kwargs: Any) -> Any:
        if ranks is not None and rank not in ranks:
            return dist.GroupMember.NON_GROUP_MEMBER
        return new_group(ranks, **{**kwargs, "backend": None})

    return own_group


def _skip_groups_of_others(rank: int) -> Any:
    """parallel_state.create_group without the work for groups that `rank` is not in."""

    def create_group(ranks: list[int] | None = None, **kwargs: Any) -> Any:
        if ranks is not None and rank not in ranks:
            return dist.GroupMember.NON_GROUP_MEMBER
        return _create_group(ranks, **kwargs)

    return create_group


def _remembered_rank_groups(
    world_size: int, parallel_size: list[int], mask: list[bool]
) -> list[list[int]]:
    """Megatron's function of that name, which every rank asks for the same; lists of one's own."""
    return [list(ranks) for ranks in _compute(world_size, tuple(parallel_size), tuple(mask))]


@cache
def _compute(
    world_size: int, parallel_size: tuple[int, ...], mask: tuple[bool, ...]
) -> list[list[int]]:
    found: list[list[int]] = _rank_groups(world_size, list(parallel_size), list(mask))
    return found
