"""Initial weights that do not depend on the parallel layout.

Megatron draws per stage and per shard, so another TP or PP size means other weights. Here each
(module, layer) is drawn whole, from a generator of its own, and every rank keeps its part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_completedp.core.roles import GAIN_ROLES, MODULE_ROLES, Module
from megatron_completedp.core.shape import ModelShape
from megatron_completedp.errors import HyperparamError
from megatron_completedp.mcore.classify import ClassifiedParameter, module_shape, partition_dim
from megatron_completedp.mcore.draw import draw_weight

#: The std of a module's weights at a global layer (None outside the stack); None for gains.
InitStd = Callable[[Module, int | None], float | None]


def initialize_parameters(
    parameters: Sequence[ClassifiedParameter],
    shape: ModelShape,
    init_std: InitStd,
    *,
    seed: int,
) -> None:
    """Overwrite every parameter in place: weights ~ normal(0, init_std^2), gains 1.

    The same seed gives the same model for every TP, PP, VPP and DP size; this rank's place in
    its TP group comes from Megatron's parallel state. Call it before the optimizer copies its
    fp32 masters. Memory: one unfused fp32 module at a time, on the CPU.

    Args:
        parameters: this rank's labelled parameters.
        shape: the whole model.
        init_std: standard deviation by (module, global layer).
        seed: of the whole run; all ranks pass the same.

    Raises:
        HyperparamError: a weight has no valid std, or a gain has one.

    """
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    for item in parameters:
        for module in dict.fromkeys(rows.module for rows in item.ranges):
            std = init_std(module, item.layer)
            _check_std(module, item.layer, std)
            if std is None:
                values = torch.ones(module_shape(module, shape))
            else:
                values = draw_weight(module, item.layer, shape, std, seed=seed)
            _place(item, module, local_slice(values, module, tp_rank=tp_rank, tp_size=tp_size))


def local_slice(full: Tensor, module: Module, *, tp_rank: int, tp_size: int) -> Tensor:
    """View of the part of a whole, unfused `module` that TP rank `tp_rank` of `tp_size` holds."""
    split = partition_dim(module)
    if split is None:
        return full
    return full.tensor_split(tp_size, dim=split)[tp_rank]


def _place(item: ClassifiedParameter, module: Module, values: Tensor) -> None:
    """Copy the local rows of `module`, in order, into their ranges of a fused parameter."""
    ranges = [rows for rows in item.ranges if rows.module is module]
    pieces = torch.split(values, [rows.stop - rows.start for rows in ranges])
    with torch.no_grad():
        for rows, piece in zip(ranges, pieces, strict=True):
            item.parameter[rows.start : rows.stop].copy_(piece)


def _check_std(module: Module, layer: int | None, std: float | None) -> None:
    is_gain = MODULE_ROLES[module] in GAIN_ROLES
    if is_gain != (std is None) or (std is not None and not (std > 0 and math.isfinite(std))):
        expected = "None: gains start at 1" if is_gain else "a positive, finite number"
        raise HyperparamError(
            f"init std of {module} (layer {layer}) is {std}; expected {expected}. Check init_std "
            "and its multipliers."
        )
