"""Models of transformers in plain torch against the Megatron engine: same plan, same losses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from megatron_completedp.core.hyperparams import BaseHyperparams
from megatron_completedp.core.monomial import M_N, Monomial
from megatron_completedp.core.roles import Role
from megatron_completedp.core.tables import Row, Rules, Table, build_table
from megatron_completedp.mcore.engine import Engine
from megatron_completedp.torch_engine import APERTUS, QWEN3, RoleMap, param_groups
from tests.mcore.engine_runs import run_engine
from tests.torch_engine.runs import (
    STEPS,
    TOLERANCE,
    difference,
    make_plan,
    parametrized,
    reference,
    train,
)

COMPLETEP = Rules(parametrization="completep", depth_alpha=0.75)

#: Every factor of the forward pass is other than 1 somewhere: residual in all, logits in completep.
CASES: dict[str, tuple[RoleMap, dict[str, Any]]] = {
    "qwen3": (QWEN3, {}),
    "qwen3_completep_softmax": (QWEN3, {"rules": COMPLETEP, "model": {"softmax_scale": 1 / 32}}),
    "qwen3_completep_tied": (
        QWEN3,
        {
            "rules": COMPLETEP,
            "model": {"tied_embeddings": True},
            "hyperparams": BaseHyperparams(lr=4e-3, hidden_init_std=0.1),
        },
    ),
    "apertus": (APERTUS, {"model": {"activation": "gelu"}}),
}


@pytest.mark.parametrize("case", CASES)
def test_ten_losses_are_those_of_megatron(case: str) -> None:
    role_map, changes = CASES[case]
    plan = make_plan(**changes)
    ratios = plan.resolved.ratios
    assert min(ratios.m_N, ratios.m_L) == 2, "at the base there would be nothing to compare"
    assert (plan.resolved.logit_multiplier == 1) == ("completep" not in case)
    trace, _ = run_engine(plan.config, stop_at=STEPS)
    assert difference(reference(plan, role_map), trace.losses) < TOLERANCE


def test_initial_weights_are_those_of_megatron() -> None:
    plan = make_plan()
    ours = dict(parametrized(plan).named_parameters())

    def compare(engine: Engine) -> int:
        compared = 0
        for item in engine.parameters:
            for module in {rows.module for rows in item.ranges}:
                parts = [
                    item.parameter[r.start : r.stop] for r in item.ranges if r.module is module
                ]
                name = QWEN3.names[module].format(layer=item.layer)
                assert torch.equal(torch.cat(parts), ours.pop(name)), name
                compared += 1
        return compared

    assert run_engine(plan.config, stop_at=0, inspect=compare)[1] == 3 + 11 * 4
    assert not ours


@pytest.fixture(scope="module")
def right() -> list[float]:
    return reference(make_plan())


def wrong_table(role: Role, column: str, factor: Monomial) -> Table:
    """The rules with one cell multiplied by `factor`."""
    table = build_table(make_plan().config.rules)
    row: Row = table.rows[role]
    wrong = replace(row, **{column: getattr(row, column) * factor})
    return replace(table, rows={**table.rows, role: wrong})


@pytest.mark.parametrize(
    ("role", "column"),
    [
        (Role.HIDDEN_WEIGHT, "lr"),
        (Role.HIDDEN_WEIGHT, "weight_decay"),
        (Role.EMBEDDING, "eps"),
        (Role.EMBEDDING, "weight_decay"),
        (Role.UNEMBEDDING, "eps"),
        (Role.PRE_NORM_GAIN, "lr"),
        (Role.FINAL_NORM_GAIN, "lr"),
    ],
)
def test_a_wrong_exponent_is_seen(role: Role, column: str, right: list[float]) -> None:
    losses = reference(make_plan(table=wrong_table(role, column, M_N)))
    assert difference(losses, right) > 2 * TOLERANCE


@pytest.mark.parametrize("key", ["lr", "betas", "eps", "weight_decay"])
def test_the_first_groups_value_for_all_is_seen(key: str, right: list[float]) -> None:
    """What an optimizer would do that reads it from its first group alone."""
    plan = make_plan()
    model = parametrized(plan)
    groups = param_groups(model, QWEN3, plan)
    for group in groups:
        group[key] = groups[0][key]
    assert difference(train(model, groups, plan), right) > 10 * TOLERANCE


def test_missing_multipliers_are_seen(right: list[float]) -> None:
    plan = make_plan()
    model = parametrized(plan)
    groups = param_groups(model, QWEN3, plan)
    for module in model.modules():
        module._forward_hooks.clear()
    assert difference(train(model, groups, plan), right) > 10 * TOLERANCE
