"""Megatron's optimizer around PerModuleAdamW, and its LR scheduler.

Megatron keeps what it is good at: fp32 masters, ZeRO-1 sharding, gradient norms over all ranks,
checkpoints. It sees one parameter group whose learning rate is the schedule's fraction; which
element trains with which numbers is in the inner optimizer's table, built here from the labels.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence

import megatron.core.optimizer as megatron_optimizer
import megatron.core.optimizer.distrib_optimizer as megatron_distrib_optimizer
import torch
from megatron.core.optimizer import (
    DistributedOptimizer,
    Float16OptimizerWithFloat16Params,
    MegatronOptimizer,
    OptimizerConfig,
    clip_grads,
    get_megatron_optimizer,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_completedp.config.parallel import ParallelConfig
from megatron_completedp.core.schedule import Schedule
from megatron_completedp.errors import CheckpointError
from megatron_completedp.mcore.classify import ClassifiedParameter
from megatron_completedp.mcore.groups import HyperparamGroup
from megatron_completedp.mcore.kernel_packages import probe_apex, probe_transformer_engine
from megatron_completedp.optim.per_module import PerModuleAdamW
from megatron_completedp.optim.segments import AdamWValues, Segment, segments_of_shard

logger = logging.getLogger(__name__)

_SCHEDULE_STYLES = {"cosine": "cosine", "linear": "linear", "wsd": "WSD", "constant": "constant"}


def build_optimizer(
    chunks: Sequence[torch.nn.Module],
    parameters: Sequence[ClassifiedParameter],
    groups: Sequence[HyperparamGroup],
    *,
    precision: str,
    parallel: ParallelConfig,
    schedule: Schedule,
) -> MegatronOptimizer:
    """Megatron's optimizer over DDP-wrapped `chunks`, every element with its module's values."""
    _use_per_module_adamw()
    logger.info("Gradient norm: %s.", norm_kernels())
    config = OptimizerConfig(
        optimizer="adam",
        # The group's learning rate is the schedule's fraction of each segment's own peak.
        lr=1.0,
        min_lr=schedule.min_lr_fraction,
        weight_decay=0.0,
        bf16=precision == "bf16",
        params_dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        clip_grad=0.0,  # folded into the update, see `apply_update`
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    optimizer = get_megatron_optimizer(config, list(chunks), config_overrides={})
    table = planned_values(groups)
    rows = _rows_by_parameter(parameters, groups)
    for part in optimizer_parts(optimizer):
        segments = {
            held: segments_of_shard(rows[model], model[0].numel(), start, stop)
            for held, model, start, stop in held_tensors(part)
        }
        part.optimizer.assign(table, segments)
    return optimizer


def build_scheduler(
    optimizer: MegatronOptimizer, schedule: Schedule, steps: int
) -> OptimizerParamScheduler:
    """Megatron's scheduler over the fraction in [min_lr_fraction, 1] that all modules follow."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=1.0,
        min_lr=schedule.min_lr_fraction,
        # Not rounded to whole steps: the schedule is a function of step / steps.
        lr_warmup_steps=schedule.warmup_fraction * steps,
        lr_decay_steps=steps,
        lr_decay_style=_SCHEDULE_STYLES[schedule.kind],
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        # A checkpoint brings the step; everything else is this run's configuration.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=schedule.decay_fraction * steps,
        lr_wsd_decay_style="linear",
    )


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Global gradient norm over all ranks; the gradients are then ready for `apply_update`.

    Not finite where a gradient is not; nothing has been updated yet.
    """
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


def norm_kernels() -> str:
    """Whose kernels sum up the gradients, and why; Megatron chose them when it was imported."""
    owner = str(clip_grads.l2_norm_impl.__module__).partition(".")[0]
    if owner == "transformer_engine":
        return f"Transformer Engine's kernels, because {probe_transformer_engine().reason}"
    if owner == "amp_C":
        return f"Apex's kernels, because {probe_apex().reason}"
    packages = (probe_transformer_engine(), probe_apex())
    if any(package.usable for package in packages):
        return "torch's operations, because the kernels of Transformer Engine and Apex need CUDA"
    return f"torch's operations, because {' and '.join(package.reason for package in packages)}"


def apply_update(optimizer: MegatronOptimizer, *, norm: float, clip_grad: float) -> None:
    """Update all parameters, gradients scaled down to a norm of `clip_grad` (0: never).

    The factor goes into the update itself, so that clipping costs no pass over the gradients.
    """
    # Megatron's and torch's formula; the small number keeps a norm of 0 from dividing.
    scale = min(1.0, clip_grad / (norm + 1e-6)) if clip_grad else 1.0
    for part in optimizer_parts(optimizer):
        part.optimizer.grad_scale = scale
    optimizer.step_with_ready_grads()


def planned_values(groups: Sequence[HyperparamGroup]) -> tuple[AdamWValues, ...]:
    """The table of the inner optimizer: one row per group, by index."""
    return tuple(
        AdamWValues(
            lr=group.hyperparams.lr,
            weight_decay=group.hyperparams.weight_decay,
            eps=group.hyperparams.eps,
            beta1=group.hyperparams.beta1,
            beta2=group.hyperparams.beta2,
        )
        for group in groups
    )


def check_live_values(
    optimizer: MegatronOptimizer, groups: Sequence[HyperparamGroup], schedule: Schedule
) -> None:
    """Raise CheckpointError when the live optimizer does not hold what the plan says.

    Loading a checkpoint replaces what stands in the parameter group; the table of values is never
    loaded. This is the proof, after every load, that no number moved.
    """
    planned = {"max_lr": 1.0, "min_lr": schedule.min_lr_fraction}
    for part in optimizer_parts(optimizer):
        if part.optimizer.table != planned_values(groups):
            raise CheckpointError(
                "the live optimizer's table of hyperparameters is not the planned one. This is a "
                "defect; please report it with the run's plan.json."
            )
        for live in part.param_groups:
            for name, value in planned.items():
                if not math.isclose(live[name], value, rel_tol=1e-12):
                    raise CheckpointError(
                        f"after loading, {name} of the schedule is {live[name]}; the plan says "
                        f"{value}. The checkpoint was written with another schedule; resume with "
                        "the configuration it was written with."
                    )


def _rows_by_parameter(
    parameters: Sequence[ClassifiedParameter], groups: Sequence[HyperparamGroup]
) -> dict[torch.Tensor, tuple[Segment, ...]]:
    """For each parameter, its row ranges with the index of the group they train in."""
    group_of = {member: group.index for group in groups for member in group.members}
    return {
        item.parameter: tuple(
            Segment(rows.start, rows.stop, group_of[rows.module, item.layer])
            for rows in item.ranges
        )
        for item in parameters
    }


def optimizer_parts(optimizer: MegatronOptimizer) -> Sequence[MegatronOptimizer]:
    """The optimizers inside Megatron's chain (one, for a dense model), or the one given."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if not getattr(part, "is_stub_optimizer", False)]


def held_tensors(
    part: MegatronOptimizer,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int, int]]:
    """(tensor of the inner optimizer, the model's parameter, and which flat elements of it).

    `part` is one of `optimizer_parts`; a tensor may be empty on a rank.
    """
    if isinstance(part, DistributedOptimizer):
        for models, shards in (
            (part.model_float16_groups, part.shard_fp32_from_float16_groups),
            (part.model_fp32_groups, part.shard_fp32_groups),
        ):
            for model, shard in _pairs(models, shards):
                cut = part._get_model_param_range_map(model)["param"]
                yield shard, model, cut.start, cut.end
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        for model, master in _pairs(part.float16_groups, part.fp32_from_float16_groups):
            yield master, model, 0, model.numel()
        for (model,) in _pairs(part.fp32_from_fp32_groups):
            yield model, model, 0, model.numel()
    else:
        for model in part.get_parameters():
            yield model, model, 0, model.numel()


def _pairs(*groups: Sequence[Sequence[torch.Tensor]]) -> Iterator[tuple[torch.Tensor, ...]]:
    for tensors in zip(*groups, strict=True):
        yield from zip(*tensors, strict=True)


def _use_per_module_adamw() -> None:
    """Make Megatron build PerModuleAdamW, by the flags it sets when Apex is importable.

    With Apex's layout the step count is in the parameter group, which the distributed optimizer
    needs to load its checkpoints; with torch's own AdamW inside it can only save them.
    """
    megatron_optimizer.Adam = PerModuleAdamW
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
    megatron_distrib_optimizer.Adam = PerModuleAdamW
    megatron_distrib_optimizer.HAVE_APEX_OR_TE = True
    megatron_distrib_optimizer.USING_APEX_OPTIMIZER = True
    megatron_distrib_optimizer.USING_TE_OPTIMIZER = False
