"""Which modules train with the same hyperparameters, for the optimizer's table and for people.

Groups are numbered from the resolved table, not from the parameters a rank happens to hold, so they
are the same on every rank and in every layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from megatron_completedp.core.hyperparams import Resolved, ResolvedHyperparams
from megatron_completedp.core.render import layer_ranges, text_table
from megatron_completedp.core.roles import Module, Role
from megatron_completedp.mcore.classify import ClassifiedParameter
from megatron_completedp.mcore.inventory import Inventory


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


def describe_groups(groups: Sequence[HyperparamGroup], whole: Inventory) -> str:
    """One line per group with its numbers and sizes; the last line sums them to the model's size.

    `whole` counts the parameters that the ranks hold; each must be in exactly one group.
    """
    members = chain.from_iterable(group.members for group in groups)
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
    group_of = {member: group for group in groups for member in group.members}
    bad = set()
    for classified in parameters:
        parameter = classified.parameter
        gradient = getattr(parameter, "main_grad", parameter.grad)
        if gradient is None:
            continue
        for rows in classified.ranges:
            if not torch.isfinite(gradient[rows.start : rows.stop]).all():
                bad.add(group_of[rows.module, classified.layer].index)
    return [groups[index].name for index in sorted(bad)]
