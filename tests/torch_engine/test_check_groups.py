"""`check_groups` sees what an engine may do to parameter groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")
pytest.importorskip("transformers")

from megatron_completedp.core.tables import Rules
from megatron_completedp.errors import HyperparamError
from megatron_completedp.plan.run_plan import Plan
from megatron_completedp.torch_engine import QWEN3, check_groups, lr_scheduler, param_groups
from tests.torch_engine.runs import STEPS, make_plan, parametrized

Groups = list[dict[str, Any]]


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan()


@pytest.fixture
def optimizer(plan: Plan) -> torch.optim.Optimizer:
    return torch.optim.AdamW(param_groups(parametrized(plan), QWEN3, plan))


def test_the_schedule_passes_at_every_step(plan: Plan, optimizer: torch.optim.Optimizer) -> None:
    check_groups(optimizer, plan)
    scheduler = lr_scheduler(optimizer, plan)
    for step in range(STEPS):
        check_groups(optimizer, plan)
        part = plan.config.schedule.at(step, STEPS)
        by_name = {name: group for group in optimizer.param_groups for name in group["param_names"]}
        (embedding,) = (e for e in plan.resolved.modules if e.module == "embedding")
        assert by_name["model.embed_tokens.weight"]["lr"] == pytest.approx(embedding.lr * part)
        optimizer.step()
        scheduler.step()


def test_a_checkpoint_of_the_same_plan_passes(plan: Plan, optimizer: torch.optim.Optimizer) -> None:
    other = torch.optim.AdamW(param_groups(parametrized(plan), QWEN3, plan))
    other.load_state_dict(optimizer.state_dict())
    check_groups(other, plan)


def test_a_checkpoint_of_another_plan_is_seen(plan: Plan, optimizer: torch.optim.Optimizer) -> None:
    other_plan = make_plan(rules=Rules(depth_alpha=1.0))
    other = torch.optim.AdamW(param_groups(parametrized(other_plan), QWEN3, other_plan))
    optimizer.load_state_dict(other.state_dict())
    with pytest.raises(HyperparamError, match="checkpoint of another plan"):
        check_groups(optimizer, plan)


def exchange_eps(groups: Groups) -> None:
    groups[1]["eps"], groups[2]["eps"] = groups[2]["eps"], groups[1]["eps"]


def one_beta2(groups: Groups) -> None:
    groups[3]["betas"] = (groups[3]["betas"][0], 0.999)


def no_decay(groups: Groups) -> None:
    groups[0]["weight_decay"] = 0.0


def level_rates(groups: Groups) -> None:
    for group in groups:
        group["lr"] = 1e-3


def lose_a_group(groups: Groups) -> None:
    del groups[0]


def lose_names(groups: Groups) -> None:
    del groups[0]["name"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (exchange_eps, r"attention_norm \[0\] trains with eps"),
        (one_beta2, "beta2 0.999; the plan's is"),
        (no_decay, "embedding trains with weight_decay 0.0"),
        (level_rates, "of its peak learning rate"),
        (lose_a_group, "no parameter group is named 'embedding'"),
        (lambda groups: groups.append({**groups[0], "name": "other"}), "named 'other'"),
        (lose_names, "no parameter group is named 'embedding'"),
    ],
)
def test_damage_is_named(
    damage: Callable[[Groups], None],
    message: str,
    plan: Plan,
    optimizer: torch.optim.Optimizer,
) -> None:
    damage(optimizer.param_groups)
    with pytest.raises(HyperparamError, match=message):
        check_groups(optimizer, plan)
