"""Short runs of transformers' models under a plan, in one process or sharded over several.

The plan is the transferred one of the Megatron engine's tests: base at half the width, depth and
batch, other multipliers for every module and layer, so that no two tensors share their values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from megatron_completedp.convert.hf_config import model_config
from megatron_completedp.core.resolve import resolve
from megatron_completedp.core.shape import ModelShape
from megatron_completedp.core.tables import Table
from megatron_completedp.plan.run_plan import Plan
from megatron_completedp.torch_engine import (
    QWEN3,
    RoleMap,
    apply_multipliers,
    init_,
    lr_scheduler,
    param_groups,
)
from tests.mcore.engine_runs import batches, run_config

STEPS = 10
#: The largest difference of a loss, relative to it. Shards and engines add the same fp32 numbers in
#: another order: 3e-7 or less was measured.
TOLERANCE = 1e-5


def make_plan(*, table: Table | None = None, **changes: Any) -> Plan:
    """Ten steps at m_N = m_L = m_B = 2 and m_D = 3.75, with a vocabulary that nothing pads.

    eps is near the gradients' size and decay is strong, so that both show in the losses.
    """
    model = {"vocab_multiple": 2, **changes.pop("model", {})}
    config = run_config(model=model, training={"z_loss": 0.0}, **changes)
    config = replace(
        config,
        training=replace(config.training, train_steps=STEPS),
        hyperparams=replace(config.hyperparams, eps=1e-4, weight_decay=4.0, gain_weight_decay=1.0),
    )
    plan = Plan.of(config)
    if table is None:
        return plan
    resolved = resolve(
        config.model,
        config.ratios,
        config.rules,
        config.hyperparams,
        config.multipliers,
        table=table,
    )
    return replace(plan, resolved=resolved)


def hf_model(shape: ModelShape, role_map: RoleMap = QWEN3, **changes: Any) -> nn.Module:
    """A fresh model of transformers with the sizes of `shape`, in the architecture of the map."""
    import transformers

    config = {**model_config(shape), "use_cache": False, **changes}
    config.pop("model_type")  # Llama's and Phi's layers have the same sizes
    model_class = getattr(transformers, role_map.model)
    model: nn.Module = model_class(model_class.config_class(**config))
    return model.float()


def parametrized(plan: Plan, role_map: RoleMap = QWEN3) -> nn.Module:
    """A model with the plan's multipliers and initial weights."""
    model = hf_model(plan.config.model, role_map)
    apply_multipliers(model, role_map, plan)
    init_(model, role_map, plan)
    return model


def batch(plan: Plan, step: int, *, rank: int = 0, size: int = 1) -> tuple[Tensor, Tensor]:
    """This rank's sequences of the step in one piece: tokens and labels."""
    micro = batches(plan.config, step, dp_rank=rank, dp_size=size)
    return torch.cat([b["tokens"] for b in micro]), torch.cat([b["labels"] for b in micro])


def loss_of(model: Callable[..., Any], tokens: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy in nats per token."""
    logits = model(input_ids=tokens).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def train(
    model: nn.Module,
    groups: Iterable[dict[str, Any]],
    plan: Plan,
    *,
    rank: int = 0,
    size: int = 1,
    mean: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> list[float]:
    """Losses of ten steps with torch's AdamW; `mean` averages a loss over the ranks."""
    optimizer = torch.optim.AdamW(groups)
    scheduler = lr_scheduler(optimizer, plan)
    losses = []
    for step in range(STEPS):
        loss = loss_of(model, *batch(plan, step, rank=rank, size=size))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), plan.config.training.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(mean(loss.detach()).item())
    return losses


def reference(plan: Plan, role_map: RoleMap = QWEN3) -> list[float]:
    """The same losses in one process."""
    model = parametrized(plan, role_map)
    return train(model, param_groups(model, role_map, plan), plan)


def difference(losses: list[float], expected: list[float]) -> float:
    """The largest relative difference over the steps."""
    assert len(losses) == len(expected) == STEPS
    return max(abs(a - b) / b for a, b in zip(losses, expected, strict=True))
