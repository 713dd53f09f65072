"""Resolved hyperparameters as parameter groups of Megatron's optimizer, and its LR scheduler.

Parameters of one role that share (lr, weight decay, eps, beta1, beta2) share a group. Groups are
numbered from the resolved table, not from the parameters a rank happens to hold, so they are the
same on every rank and in every layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import megatron.core.optimizer as megatron_optimizer
import megatron.core.optimizer.distrib_optimizer as megatron_distrib_optimizer
import torch
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
)
from megatron.core.optimizer.optimizer_config import ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_completedp.config.parallel import ParallelConfig
from megatron_completedp.core.hyperparams import Resolved, ResolvedHyperparams
from megatron_completedp.core.render import layer_ranges, text_table
from megatron_completedp.core.roles import Module, Role
from megatron_completedp.core.schedule import Schedule
from megatron_completedp.errors import CheckpointError, ConfigError
from megatron_completedp.mcore.classify import ClassifiedParameter
from megatron_completedp.mcore.inventory import Inventory
from megatron_completedp.optim.grouped import GroupedAdamW

#: Attribute that names a parameter's group; it survives DDP and mixed-precision wrapping.
GROUP_ATTRIBUTE = "completedp_group"

_SCHEDULE_STYLES = {"cosine": "cosine", "linear": "linear", "wsd": "WSD", "constant": "constant"}


@dataclass(frozen=True)
class HyperparamGroup:
    """Modules of one role that train with the same five optimizer hyperparameters."""

    index: int
    hyperparams: ResolvedHyperparams
    """One of the members; the others agree with its `optimizer_values`."""
    members: tuple[tuple[Module, int | None], ...]
    """(module, layer) of every tensor in the group, over the whole model."""

    @property
    def name(self) -> str:
        """Members for people: modules, with layers where they are not all alike."""
        layers: dict[str, list[int]] = {}
        for module, layer in self.members:
            where = layers.setdefault(module.value, [])
            if layer is not None:
                where.append(layer)
        by_range: dict[str, list[str]] = {}
        for module_name, where in layers.items():
            by_range.setdefault(layer_ranges(where), []).append(module_name)
        return "; ".join(
            " ".join(names) + (f" [{ranges}]" if ranges != "-" else "")
            for ranges, names in by_range.items()
        )


def hyperparam_groups(resolved: Resolved) -> tuple[HyperparamGroup, ...]:
    """The groups of a resolved table, in the order of their first member."""
    members: dict[tuple[Role, tuple[float, ...]], list[ResolvedHyperparams]] = {}
    for entry in resolved.modules:
        members.setdefault((entry.role, entry.optimizer_values), []).append(entry)
    return tuple(
        HyperparamGroup(index, entries[0], tuple((e.module, e.layer) for e in entries))
        for index, entries in enumerate(members.values())
    )


def tag_parameters(
    parameters: Sequence[ClassifiedParameter], groups: Sequence[HyperparamGroup]
) -> None:
    """Mark every parameter with its group's index.

    Raises ConfigError when the modules fused in one weight have different hyperparameters: a
    parameter group holds whole tensors.
    """
    group_of = {member: group.index for group in groups for member in group.members}
    for classified in parameters:
        indices = {group_of[row.module, classified.layer] for row in classified.ranges}
        if len(indices) > 1:
            modules = sorted({row.module.value for row in classified.ranges})
            raise ConfigError(
                f"{classified.global_name} fuses {', '.join(modules)}, whose optimizer "
                "hyperparameters differ, and this optimizer applies one set per tensor. Give these "
                "modules equal multipliers (init_std_mult may differ)."
            )
        setattr(classified.parameter, GROUP_ATTRIBUTE, indices.pop())


def build_optimizer(
    chunks: Sequence[torch.nn.Module],
    groups: Sequence[HyperparamGroup],
    *,
    precision: str,
    clip_grad: float,
    parallel: ParallelConfig,
    schedule: Schedule,
) -> MegatronOptimizer:
    """Megatron's optimizer over DDP-wrapped `chunks` whose parameters carry group tags."""
    _use_grouped_adamw()
    first = groups[0].hyperparams
    config = OptimizerConfig(
        optimizer="adam",
        lr=first.lr,
        min_lr=0.0,
        weight_decay=first.weight_decay,
        adam_beta1=first.beta1,
        adam_beta2=first.beta2,
        adam_eps=first.eps,
        bf16=precision == "bf16",
        params_dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        clip_grad=clip_grad,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    overrides = {_key(group.index): _override(group, schedule) for group in groups}
    return get_megatron_optimizer(config, list(chunks), config_overrides=overrides)


def build_scheduler(
    optimizer: MegatronOptimizer, schedule: Schedule, steps: int
) -> OptimizerParamScheduler:
    """Megatron's scheduler; per-group peaks, floors and decays come from the group overrides."""
    floors = [group["min_lr"] for group in optimizer.param_groups]
    peaks = [group["max_lr"] for group in optimizer.param_groups]
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=max(peaks),
        min_lr=min(floors),
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


def check_group_values(
    optimizer: MegatronOptimizer, groups: Sequence[HyperparamGroup], schedule: Schedule
) -> None:
    """Raise CheckpointError when a group of the live optimizer is not what the plan says.

    Loading a checkpoint replaces the values in the param groups, and megatron-core matches saved
    groups to live ones by keys that leave out eps and betas; this is the proof that none moved.
    """
    for live in optimizer.param_groups:
        group = groups[int(live["lr_mult"]) - 1]
        for name, planned in _override(group, schedule).items():
            found = tuple(live[name]) if name == "betas" else live[name]
            if found != planned:
                raise CheckpointError(
                    f"after loading, {name} of the group {group.name!r} is {found}; the plan says "
                    f"{planned}. The checkpoint was written with other hyperparameters; resume "
                    "with the configuration it was written with."
                )


def describe_groups(groups: Sequence[HyperparamGroup], whole: Inventory) -> str:
    """One line per group with its numbers and sizes; the last line sums them to the model's size.

    `whole` counts the parameters that the ranks hold; each must be in exactly one group.
    """
    members = [member for group in groups for member in group.members]
    assert sorted(members, key=str) == sorted(whole, key=str), "groups do not partition the model"
    rows, total = [], 0
    for group in groups:
        hp = group.hyperparams
        size = sum(whole[member] for member in group.members)
        total += size
        numbers = (hp.lr, hp.weight_decay, hp.eps, hp.beta1, hp.beta2)
        rows.append([str(group.index), *(f"{n:.5g}" for n in numbers), f"{size:,}", group.name])
    header = ["group", "peak lr", "weight decay", "eps", "beta1", "beta2", "parameters", "members"]
    # The member list is last and of any length: keep it out of the alignment.
    names = [header.pop(), *(row.pop() for row in rows)]
    lines = text_table(header, rows, left=0).splitlines()
    body = [f"{line}  {name}" for line, name in zip(lines, names, strict=True)]
    return "\n".join([*body, f"{len(groups)} groups, {total:,} parameters = the whole model"])


def groups_with_nonfinite_gradients(
    parameters: Iterable[ClassifiedParameter], groups: Sequence[HyperparamGroup]
) -> list[str]:
    """Names of the groups with a NaN or inf in a gradient this rank holds, in group order."""
    bad = set()
    for classified in parameters:
        parameter = classified.parameter
        gradient = getattr(parameter, "main_grad", parameter.grad)
        if gradient is not None and not torch.isfinite(gradient).all():
            bad.add(getattr(parameter, GROUP_ATTRIBUTE))
    return [groups[index].name for index in sorted(bad)]


def _key(index: int) -> ParamKey:
    # Predicates are hashed by name alone, so the name must tell groups apart.
    return ParamKey(
        predicate=ParamPredicate(
            name=f"{GROUP_ATTRIBUTE}_{index}",
            fn=lambda param: getattr(param, GROUP_ATTRIBUTE) == index,
        )
    )


def _override(group: HyperparamGroup, schedule: Schedule) -> dict[str, Any]:
    hp = group.hyperparams
    return {
        "max_lr": hp.lr,
        "min_lr": hp.lr * schedule.min_lr_fraction,
        "start_wd": hp.weight_decay,
        "end_wd": hp.weight_decay,
        "wd_mult": 1.0,
        "eps": hp.eps,
        "betas": (hp.beta1, hp.beta2),
        # Read by nothing, but part of the key by which checkpoints match groups in every version;
        # without it, groups that differ only in eps or betas exchange values on load.
        "lr_mult": float(group.index + 1),
    }


def _use_grouped_adamw() -> None:
    """Make Megatron build GroupedAdamW, by the flags it sets when Apex is importable."""
    megatron_optimizer.Adam = GroupedAdamW
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
    megatron_distrib_optimizer.Adam = GroupedAdamW
    megatron_distrib_optimizer.HAVE_APEX_OR_TE = True
    megatron_distrib_optimizer.USING_APEX_OPTIMIZER = True
    megatron_distrib_optimizer.USING_TE_OPTIMIZER = False
