"""Parameter groups for torch's and DeepSpeed's AdamW, and proof that an engine kept them."""

from __future__ import annotations

import math
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from megatron_completedp.core.roles import Module
from megatron_completedp.errors import HyperparamError
from megatron_completedp.mcore import groups as table_groups
from megatron_completedp.plan.run_plan import Plan
from megatron_completedp.torch_engine.multipliers import check_multipliers
from megatron_completedp.torch_engine.role_map import RoleMap, label_parameters

#: Modules that the plan has and the model of a role map may lack.
_OPTIONAL = frozenset({Module.Q_NORM, Module.K_NORM})


class HasGroups(Protocol):
    """A torch optimizer, or what DeepSpeed wraps around one."""

    param_groups: list[dict[str, Any]]


def param_groups(model: nn.Module, role_map: RoleMap, plan: Plan) -> list[dict[str, Any]]:
    """Parameter groups of `model`, one for each role and distinct set of AdamW values.

    For torch.optim.AdamW and DeepSpeed's Adam: `lr` (the peak), `betas`, `eps` and `weight_decay`
    (decoupled, multiplied by the learning rate, as in the rules), with `name` (the group's modules
    and layers) and `param_names` for logs. Every parameter is in exactly one group. With FSDP2 call
    it after `fully_shard`, which replaces parameters; with DeepSpeed before `initialize`.

    Raises ConfigError when the plan's multipliers are not in the model (`apply_multipliers`), and
    what `label_parameters` raises.
    """
    labels = label_parameters(model, role_map, plan.config.model)
    check_multipliers(model, role_map, plan)
    by_place = {(item.module, item.layer): item for item in labels}
    groups = []
    for group in table_groups.hyperparam_groups(plan.resolved):
        members = [by_place.pop(place) for place in group.members if place in by_place]
        if not members:  # QK norms, in a model without
            continue
        values = group.hyperparams
        groups.append(
            {
                "params": [item.parameter for item in members],
                "lr": values.lr,
                "betas": (values.beta1, values.beta2),
                "eps": values.eps,
                "weight_decay": values.weight_decay,
                "name": group.name,
                "param_names": [item.name for item in members],
            }
        )
    assert not by_place, f"in no group: {list(by_place)}"
    return groups


def describe_groups(model: nn.Module, role_map: RoleMap, plan: Plan) -> str:
    """One line per group with its numbers and sizes, for the start-up log."""
    labels = label_parameters(model, role_map, plan.config.model)
    sizes = {(item.module, item.layer): math.prod(item.size) for item in labels}
    groups = table_groups.hyperparam_groups(plan.resolved)
    return table_groups.describe_groups(
        [group for group in groups if group.members[0] in sizes], sizes
    )


def lr_scheduler(optimizer: Optimizer, plan: Plan) -> LambdaLR:
    """The plan's schedule: each group follows it from its own peak.

    Make it before the first step, and step it once after each one (DeepSpeed does so when given it
    as `lr_scheduler`). A schedule from DeepSpeed's configuration will not do: it writes one and the
    same learning rate into every group.
    """
    schedule, steps = plan.config.schedule, plan.config.steps
    return LambdaLR(optimizer, lambda step: schedule.at(step, steps))


def check_groups(optimizer: HasGroups, plan: Plan) -> None:
    """Raise HyperparamError unless `optimizer` trains every group with the plan's values.

    Betas, eps and weight decay must be the group's own, and all learning rates the same part of
    their peaks. Call it after an engine took the optimizer over, after a checkpoint was loaded into
    it, and once while training: a scheduler may have levelled the learning rates since.
    """
    groups = table_groups.hyperparam_groups(plan.resolved)
    expected = {group.name: group.hyperparams for group in groups}
    held_names = {group.get("name") for group in optimizer.param_groups}
    for group in groups:
        optional = all(module in _OPTIONAL for module, _ in group.members)
        if group.name not in held_names and not optional:
            raise HyperparamError(
                f"no parameter group is named {group.name!r}: the engine would leave these modules "
                "as they are. Build the optimizer from param_groups(model, role_map, plan), whole."
            )
    first: tuple[str, float] | None = None
    for held_group in optimizer.param_groups:
        name = held_group.get("name")
        if name not in expected:
            raise HyperparamError(
                f"a parameter group is named {name!r}; expected one of the plan's groups. Build "
                "the optimizer from param_groups(model, role_map, plan) and nothing else."
            )
        values = expected[name]
        planned = {"eps": values.eps, "weight_decay": values.weight_decay}
        planned |= {"beta1": values.beta1, "beta2": values.beta2}
        held = {key: held_group[key] for key in ("eps", "weight_decay")}
        held["beta1"], held["beta2"] = held_group["betas"]
        for key, value in planned.items():
            if held[key] != value:
                raise HyperparamError(
                    f"group {name} trains with {key} {held[key]}; the plan's is {value}. Something "
                    "replaced it: a checkpoint of another plan, or the engine's own configuration."
                )
        part = float(held_group["lr"]) / values.lr
        first = first or (name, part)
        if not math.isclose(part, first[1], rel_tol=1e-6, abs_tol=1e-12):
            raise HyperparamError(
                f"group {name} is at {part:.6g} of its peak learning rate and group {first[0]} at "
                f"{first[1]:.6g}; expected the same part. A scheduler that writes one rate into "
                "every group (as those of DeepSpeed's configuration do) undoes the rules: use "
                "lr_scheduler(optimizer, plan)."
            )
