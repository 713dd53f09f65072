"""Initial weights of a torch model: those that the Megatron engine gives the same plan."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from megatron_completedp.errors import ConfigError
from megatron_completedp.mcore.draw import draw_weight
from megatron_completedp.plan.run_plan import Plan
from megatron_completedp.torch_engine.role_map import LabelledParameter, RoleMap, label_parameters


@torch.no_grad()
def init_(model: nn.Module, role_map: RoleMap, plan: Plan) -> None:
    """Overwrite every parameter in place: weights ~ normal(0, init_std^2), gains 1.

    The same plan and seed give the same weights on any number of processes, sharded by FSDP2 or
    not, and in the Megatron engine. Call it before an engine or optimizer copies the weights
    (DeepSpeed does so in `initialize`); for a model on the meta device, after `to_empty`, when its
    buffers need new values too. Memory: one whole fp32 weight at a time, on the CPU.

    Raises ConfigError for parameters without storage, and what `label_parameters` raises.
    """
    shape, seed = plan.config.model, plan.config.seed
    for item in label_parameters(model, role_map, shape):
        _check_storage(item)
        std = plan.resolved.get(item.module, item.layer).init_std
        if std is None:
            values = torch.ones(item.size)
        else:
            # A vocabulary that the model does not pad leaves the last rows of the draw behind.
            values = draw_weight(item.module, item.layer, shape, std, seed=seed)[: item.size[0]]
        _copy(item.parameter, values)


def _check_storage(item: LabelledParameter) -> None:
    if item.parameter.is_meta:
        raise ConfigError(
            f"{item.name} is on the meta device and has no storage to initialize; call "
            "model.to_empty(device=...) first."
        )
    if tuple(item.parameter.shape) != item.size:
        raise ConfigError(
            f"{item.name} is partitioned by ZeRO-3 and this process holds a part of it; call init_ "
            "before deepspeed.initialize, or inside deepspeed.zero.GatheredParameters("
            "list(model.parameters()), modifier_rank=0)."
        )


def _copy(parameter: nn.Parameter, values: Tensor) -> None:
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        values = distribute_tensor(values.to(parameter.device), mesh, placements)
    parameter.copy_(values)
