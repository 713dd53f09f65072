"""Build all that one simulated rank would train with, and take down what it has."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    apply_factories,
    is_main_replica,
)
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import DistributedOptimizer, MegatronOptimizer
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_completedp.core.roles import Module
from megatron_completedp.mcore.classify import ClassifiedParameter, classify_model
from megatron_completedp.mcore.data_parallel import wrap_chunks
from megatron_completedp.mcore.groups import hyperparam_groups
from megatron_completedp.mcore.inventory import inventory
from megatron_completedp.mcore.optimizer import build_optimizer, held_tensors, optimizer_parts
from megatron_completedp.mcore.rank_checks import check_ownership, check_segments
from megatron_completedp.mcore.rank_record import (
    LabelledTensor,
    Place,
    RankRecord,
    SavedTensor,
    Shard,
    StateBytes,
)
from megatron_completedp.mcore.sharded_state import content_metadata, sharded_state
from megatron_completedp.mcore.simulated_rank import (
    build_on_meta,
    replaced,
    tensors_without_data,
)
from megatron_completedp.optim.segments import AdamWValues
from megatron_completedp.plan.run_plan import Plan


def record_rank(plan: Plan) -> RankRecord:
    """Build the rank that `simulated_rank` has made of this process, and check what it owns.

    The model, its buffers and its optimizer come from the functions that training calls.

    Raises ClassificationError when a parameter has no module, an element no optimizer or two, or
    an element another module's hyperparameters.
    """
    config = plan.config
    chunks = build_on_meta(config.model, config.parallel, config.training.precision)
    parameters = classify_model(chunks, config.model, config.parallel)
    with tensors_without_data():
        wrapped = wrap_chunks(chunks, config.parallel)
        optimizer = build_optimizer(
            wrapped,
            parameters,
            hyperparam_groups(plan.resolved),
            precision=config.training.precision,
            parallel=config.parallel,
            schedule=config.schedule,
        )
        (part,) = optimizer_parts(optimizer)
        part.init_state_fn(part.optimizer, part.config)  # the moments, as before the first step
        state = _state_bytes(wrapped, part)
        saved = _saved_tensors(wrapped, optimizer)
    data_parallel_ranks = dist.get_process_group_ranks(parallel_state.get_data_parallel_group())
    names: dict[torch.Tensor, str] = {item.parameter: item.global_name for item in parameters}
    record = RankRecord(
        place=Place(
            rank=dist.get_rank(),
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
            dp_rank=parallel_state.get_data_parallel_rank(),
        ),
        data_parallel_ranks=tuple(data_parallel_ranks),
        counts=inventory(parameters),
        tensors={item.global_name: _labelled(item) for item in parameters},
        shards=_shards(part, names, len(data_parallel_ranks)),
        segments=sum(map(len, part.optimizer.segments.values())),
        saved=saved,
        state=state,
    )
    _check_own(record, part, names, plan)
    return record


def _check_own(
    record: RankRecord,
    part: MegatronOptimizer,
    names: Mapping[torch.Tensor, str],
    plan: Plan,
) -> None:
    """Every element of this rank's part of the model has one optimizer, and its module's values."""
    sharded = isinstance(part, DistributedOptimizer)
    for shards in [sum(record.shards, ())] if sharded else record.shards:
        check_ownership(record.tensors, shards, str(record.place))

    def planned(module: Module, layer: int | None) -> AdamWValues:
        hp = plan.resolved.get(module, layer)
        return AdamWValues(
            lr=hp.lr, weight_decay=hp.weight_decay, eps=hp.eps, beta1=hp.beta1, beta2=hp.beta2
        )

    held = {}
    for tensor, model, start, stop in held_tensors(part):
        shard = Shard(names[model], start, stop)
        if start < stop:
            held[shard] = part.optimizer.segments[tensor]
    own = record.shards[record.place.dp_rank]
    assert sorted(held) == sorted(own), f"{record.place}: the optimizer holds other shards"
    for shard, segments in held.items():
        check_segments(record.tensors[shard.name], shard, segments, part.optimizer.table, planned)


def _labelled(item: ClassifiedParameter) -> LabelledTensor:
    return LabelledTensor(
        elements=item.parameter.numel(),
        columns=math.prod(item.parameter.shape[1:]),
        layer=item.layer,
        ranges=item.ranges,
    )


def _shards(
    part: MegatronOptimizer, names: Mapping[torch.Tensor, str], replicas: int
) -> tuple[tuple[Shard, ...], ...]:
    """What the optimizer of each data-parallel rank updates, by the function that cuts it there."""
    if not isinstance(part, DistributedOptimizer):
        whole = tuple(Shard(name, 0, parameter.numel()) for parameter, name in names.items())
        return (whole,) * replicas
    return tuple(
        tuple(
            Shard(names[parameter], cut["param"].start, cut["param"].end)
            for buffer in part.buffers
            for parameter, cut in _cuts(part, buffer, dp_rank, replicas)
        )
        for dp_rank in range(replicas)
    )


def _cuts(
    part: DistributedOptimizer, buffer: Any, dp_rank: int, replicas: int
) -> Iterator[tuple[torch.Tensor, Any]]:
    """(parameter, ranges) of `buffer` as Megatron cuts it on another data-parallel rank."""
    group = SimpleNamespace(rank=lambda: dp_rank, size=lambda: replicas)
    with replaced(buffer, "data_parallel_group", group):
        for bucket in range(len(buffer.buckets)):
            yield from part._build_model_gbuf_range(buffer, bucket)["param_map"].items()


def _state_bytes(chunks: Sequence[DistributedDataParallel], part: MegatronOptimizer) -> StateBytes:
    buffers = [buffer for chunk in chunks for buffer in chunk.buffers]
    models = [parameter for chunk in chunks for parameter in chunk.parameters()]
    held = [(tensor, model) for tensor, model, _, _ in held_tensors(part)]
    parameters = sum(map(_bytes, models))
    gradients = sum(_bytes(parameter.main_grad) for parameter in models)
    return StateBytes(
        parameters=parameters,
        gradients=gradients,
        # In fp32 the optimizer updates the parameters themselves.
        masters=sum(_bytes(tensor) for tensor, model in held if tensor.dtype != model.dtype),
        moments=sum(
            _bytes(moment) for tensor, _ in held for moment in part.optimizer.state[tensor].values()
        ),
        padding=sum(_bytes(buffer.grad_data) for buffer in buffers)
        - gradients
        # Weights lie in a buffer only where a sharded optimizer gathers them there.
        + sum(
            _bytes(b.param_data) - sum(map(_bytes, b.params))
            for b in buffers
            if b.param_data is not None
        ),
    )


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _saved_tensors(
    chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer
) -> tuple[SavedTensor, ...]:
    """The tensors this rank would write; where they go does not depend on what they hold."""
    # A gathered state is allocated on the CPU by name; fake tensors have no data there either.
    with FakeTensorMode(allow_non_fake_inputs=True):
        state = sharded_state(chunks, optimizer, content_metadata(), is_loading=True)
        apply_factories(state)
    return tuple(
        SavedTensor(
            key=item.key,
            global_shape=tuple(item.global_shape),
            offset=tuple(item.global_offset),
            shape=(1,) * item.prepend_axis_num + tuple(item.local_shape),
        )
        for item in nested_values(state)
        if isinstance(item, ShardedTensor) and is_main_replica(item.replica_id)
    )
