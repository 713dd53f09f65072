"""Every element is updated with its own module's numbers, and keeps them through a checkpoint."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_completedp.config.parallel import ParallelConfig
from megatron_completedp.config.run import RunConfig
from megatron_completedp.core.multipliers import ModuleMultipliers, Multipliers
from megatron_completedp.core.roles import Module
from megatron_completedp.errors import CheckpointError
from megatron_completedp.mcore.engine import Engine
from megatron_completedp.mcore.optimizer import check_live_values
from megatron_completedp.mcore.platform import Platform
from megatron_completedp.optim.per_module import PerModuleAdamW
from megatron_completedp.optim.segments import AdamWValues
from megatron_completedp.plan.run_plan import Plan
from tests.mcore.engine_runs import STEPS, batches, run_config, run_engine

LAYOUTS = {
    "fp32": ({}, "fp32"),
    "distributed": ({"use_distributed_optimizer": True}, "fp32"),
    "bf16": ({}, "bf16"),
    "bf16_distributed": ({"use_distributed_optimizer": True}, "bf16"),
}
FIELDS = [item.name for item in fields(AdamWValues)]


def config_of(layout: str) -> RunConfig:
    parallel, precision = LAYOUTS[layout]
    return run_config(ParallelConfig(**parallel), training={"precision": precision})


def build(config: RunConfig, platform: Platform) -> Engine:
    return Engine(config, Plan.of(config).resolved, platform)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_table_and_its_segments_are_the_plan(
    platform: Platform, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    """What `assign` was given, element by element, against the resolved table."""
    seen: dict[str, Any] = {}
    assign = PerModuleAdamW.assign

    def record(self: PerModuleAdamW, table: Any, segments: Any) -> None:
        seen.update(table=table, segments=segments)
        assign(self, table, segments)

    monkeypatch.setattr(PerModuleAdamW, "assign", record)
    engine = build(config_of(layout), platform)
    # One process holds every tensor whole.
    found = [
        (held.numel(), [(s.start, s.stop, seen["table"][s.values]) for s in segments])
        for held, segments in seen["segments"].items()
    ]
    planned = []
    for item in engine.parameters:
        columns = item.parameter[0].numel()
        ranges = []
        for rows in item.ranges:
            hp = engine.resolved.get(rows.module, item.layer)
            values = AdamWValues(**{name: getattr(hp, name) for name in FIELDS})
            ranges.append((rows.start * columns, rows.stop * columns, values))
        planned.append((item.parameter.numel(), ranges))

    def key(entry: Any) -> Any:
        return entry[0], [(start, stop, values.lr) for start, stop, values in entry[1]]

    assert sorted(found, key=key) == sorted(planned, key=key)
    assert len(seen["table"]) == len(engine.resolved.modules), "every (module, layer) differs"


@pytest.mark.parametrize("column", FIELDS)
@pytest.mark.parametrize("layout", ["fp32", "bf16_distributed"])
def test_modules_that_differ_in_one_value_keep_it_through_a_checkpoint(
    tmp_path: Path, layout: str, column: str
) -> None:
    """Q and k, rows of one tensor, differ in exactly one of the five."""
    mult = {"beta1": "one_minus_beta1_mult", "beta2": "one_minus_beta2_mult"}
    types = {Module.Q: ModuleMultipliers(**{mult.get(column, f"{column}_mult"): 1.7})}
    config = replace(config_of(layout), multipliers=Multipliers(types=types))
    hp = Plan.of(config).resolved
    q, k = hp.get(Module.Q, 0), hp.get(Module.K, 0)
    assert [name for name in FIELDS if getattr(q, name) != getattr(k, name)] == [column]
    whole, _ = run_engine(config)
    run_engine(config, stop_at=STEPS // 2, save_to=tmp_path)
    resumed, _ = run_engine(config, resume_from=tmp_path / f"step_{STEPS // 2:08d}")
    assert resumed.losses == whole.losses[STEPS // 2 :]


def test_clipping_in_the_update_is_clipping_before_it(platform: Platform) -> None:
    """A clip far below the norm, against scaling the gradients by hand with clipping off."""
    clip = 1e-3

    def weights(clip_grad: float, scale_by_hand: bool) -> torch.Tensor:
        engine = build(run_config(training={"clip_grad": clip_grad}), platform)
        if scale_by_hand:
            norm = engine.optimizer.get_grad_norm

            def scaled() -> float:
                value = norm()
                for item in engine.parameters:
                    item.parameter.grad.mul_(clip / (value + 1e-6))
                return value

            engine.optimizer.get_grad_norm = scaled
        for step in range(3):
            engine.train_step(batches(engine.config, step))
        return torch.cat([item.parameter.detach().flatten() for item in engine.parameters])

    folded = weights(clip, scale_by_hand=False)
    by_hand = weights(0.0, scale_by_hand=True)
    unclipped = weights(0.0, scale_by_hand=False)
    # fp32 rounding of g * s against g / (1 / s); eps is far below the clipped gradients.
    torch.testing.assert_close(folded, by_hand, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(folded, unclipped, rtol=1e-5, atol=1e-7)


def test_a_live_value_that_left_the_plan_is_noticed(platform: Platform) -> None:
    engine = build(run_config(), platform)
    arguments = engine.groups, engine.config.schedule
    check_live_values(engine.optimizer, *arguments)
    (group,) = engine.optimizer.param_groups
    group["min_lr"] = 0.5
    with pytest.raises(
        CheckpointError, match=r"min_lr of the schedule is 0\.5; the plan says 0\.1"
    ):
        check_live_values(engine.optimizer, *arguments)
    group["min_lr"] = engine.config.schedule.min_lr_fraction
    other = build(replace(run_config(), multipliers=Multipliers()), platform)
    with pytest.raises(CheckpointError, match="not the planned one"):
        check_live_values(engine.optimizer, other.groups, engine.config.schedule)
