"""Every parameter is updated with its own numbers, and keeps them through a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_completedp.config.parallel import ParallelConfig
from megatron_completedp.config.run import RunConfig
from megatron_completedp.core.multipliers import ModuleMultipliers, Multipliers
from megatron_completedp.core.roles import Module
from megatron_completedp.errors import CheckpointError, ConfigError
from megatron_completedp.mcore import checkpoint as checkpoint_module
from megatron_completedp.mcore import optimizer as optimizer_module
from megatron_completedp.mcore.engine import Engine
from megatron_completedp.mcore.optimizer import check_group_values
from megatron_completedp.mcore.platform import Platform
from megatron_completedp.optim.grouped import GroupedAdamW
from megatron_completedp.plan.run_plan import Plan
from tests.mcore.engine_runs import STEPS, batches, run_config, run_engine

LAYOUTS = {
    "fp32": ParallelConfig(),
    "distributed": ParallelConfig(use_distributed_optimizer=True),
}


def with_types(config: RunConfig, **types: ModuleMultipliers) -> RunConfig:
    by_module = {Module(name): multipliers for name, multipliers in types.items()}
    return replace(config, multipliers=Multipliers(types=by_module))


def build(config: RunConfig, platform: Platform) -> Engine:
    return Engine(config, Plan.of(config).resolved, platform)


def test_every_parameter_lives_in_a_group_with_its_resolved_numbers(platform: Platform) -> None:
    """The base has half the width, depth and batch and a third of the tokens."""
    config = run_config()
    ratios = config.ratios
    assert min(ratios.m_N, ratios.m_L, ratios.m_B, ratios.m_D) > 1
    engine = build(config, platform)
    for step in range(3):
        engine.train_step(batches(config, step))
    rate = config.schedule.at(engine.step, config.steps)
    assert rate not in (0, 1)
    group_of = {id(p): group for group in engine.optimizer.param_groups for p in group["params"]}
    assert len(group_of) == len(engine.parameters)
    for classified in engine.parameters:
        live = group_of[id(classified.parameter)]
        for row in classified.ranges:
            planned = engine.resolved.get(row.module, classified.layer)
            # The scheduler multiplies in another order than this line does.
            assert live["lr"] == pytest.approx(planned.lr * rate, rel=1e-12)
            assert live["weight_decay"] == planned.weight_decay
            assert live["eps"] == planned.eps
            assert tuple(live["betas"]) == (planned.beta1, planned.beta2)
    hyperparams = [group.hyperparams.optimizer_values for group in engine.groups]
    assert all(len(set(column)) > 1 for column in list(zip(*hyperparams, strict=True))[:3])


def test_modules_of_one_tensor_must_agree(platform: Platform) -> None:
    config = run_config()
    for name in ("lr_mult", "weight_decay_mult", "eps_mult", "one_minus_beta1_mult"):
        other = ModuleMultipliers(**{name: 1.5})
        with pytest.raises(ConfigError, match=r"linear_qkv\.weight fuses k, q, v"):
            build(with_types(config, q=other), platform)
        with pytest.raises(ConfigError, match=r"linear_fc1\.weight fuses gate, up"):
            build(with_types(config, gate=other), platform)
    same = ModuleMultipliers(lr_mult=2.0, eps_mult=0.5)
    engine = build(with_types(config, q=same, k=replace(same, init_std_mult=3.0), v=same), platform)
    (qkv,) = {group.name for group in engine.groups if {m for m, _ in group.members} & {Module.Q}}
    assert qkv.startswith("q k v [")


@pytest.mark.parametrize("amount", [1.0, 50.0], ids=["small_gradients", "large_gradients"])
def test_grouped_adamw_is_torch_adamw(amount: float) -> None:
    """50 steps with moving rates, a group without gradients, and one that starts to get them."""

    def run(kind: type[torch.optim.Optimizer], **changes: Any) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(3)
        shapes = [(17, 9), (33,), (8, 8), (5,)]
        params = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
        groups = [
            {"lr": 1e-2, "weight_decay": 0.3, "betas": (0.9, 0.95), "eps": 1e-8},
            {"lr": 3e-3, "weight_decay": 0.0, "betas": (0.8, 0.99), "eps": 1e-3},
            {"lr": 1e-1, "weight_decay": 1e-2, "betas": (0.5, 0.6), "eps": 1.0},
        ]
        groups[1].update(changes)
        members = ([params[0], params[1]], [params[2]], [params[3]])
        extra = {"fused": True} if kind is torch.optim.AdamW else {}
        optimizer = kind(
            [{"params": p, **g} for p, g in zip(members, groups, strict=True)], **groups[0], **extra
        )
        for step in range(50):
            for p in params[: 3 if step < 10 else 4]:
                p.grad = amount * torch.randn(p.shape, generator=generator)
            for group, planned in zip(optimizer.param_groups, groups, strict=True):
                group["lr"] = planned["lr"] * (1 - step / 60)
            optimizer.step()
        return params

    expected, got = run(torch.optim.AdamW), run(GroupedAdamW)
    # The same kernel on the same numbers. The last group is the exception by design: its step count
    # moves while it has no gradient, as in Apex's optimizer.
    assert all(torch.equal(a, b) for a, b in zip(expected[:3], got[:3], strict=True))
    assert torch.isfinite(got[3]).all()
    # Negative control: one value of one group.
    for changes in ({"eps": 1.1e-3}, {"betas": (0.8, 0.98)}, {"weight_decay": 1e-3}):
        assert not torch.equal(run(GroupedAdamW, **changes)[2], expected[2])


#: o and down share role, lr, decay and everything else but the one value named.
COLLIDING = {
    "eps": {"o": ModuleMultipliers(eps_mult=3.0)},
    "betas": {"o": ModuleMultipliers(one_minus_beta2_mult=2.0)},
}


def live_values(engine: Engine) -> list[tuple[int, float, tuple[float, ...]]]:
    """(elements, eps, betas) of every group of the live optimizer, sorted."""
    return sorted(
        (sum(p.numel() for p in group["params"]), group["eps"], tuple(group["betas"]))
        for group in engine.optimizer.param_groups
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("column", COLLIDING)
def test_groups_that_differ_in_one_value_keep_it_through_a_checkpoint(
    tmp_path: Path, layout: str, column: str
) -> None:
    config = with_types(run_config(LAYOUTS[layout]), **COLLIDING[column])
    whole, planned = run_engine(config, inspect=live_values)
    run_engine(config, stop_at=STEPS // 2, save_to=tmp_path)
    path = tmp_path / f"step_{STEPS // 2:08d}"
    resumed, loaded = run_engine(config, resume_from=path, inspect=live_values)
    assert loaded == planned
    assert resumed.losses == whole.losses[STEPS // 2 :]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_distinct_lr_mult_the_values_would_collide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    """Negative control: what keeps the groups apart is lr_mult, and the test above notices."""
    override = optimizer_module._override
    monkeypatch.setattr(
        optimizer_module, "_override", lambda *args: {**override(*args), "lr_mult": 1.0}
    )
    monkeypatch.setattr(checkpoint_module, "check_group_values", lambda *args: None)
    config = with_types(run_config(LAYOUTS[layout]), **COLLIDING["eps"])
    _, planned = run_engine(config, stop_at=2, save_to=tmp_path, inspect=live_values)
    loaded, refused = planned, ""
    try:
        _, loaded = run_engine(
            config, stop_at=2, resume_from=tmp_path / "step_00000002", inspect=live_values
        )
    except ValueError as error:  # torch notices when the groups that collide differ in size
        refused = str(error)
    assert loaded != planned or "parameter group" in refused


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("eps", 1e-3), ("betas", (0.5, 0.5)), ("max_lr", 1.0), ("start_wd", 9.0)],
)
def test_a_group_that_left_the_plan_is_noticed(platform: Platform, name: str, wrong: Any) -> None:
    engine = build(run_config(), platform)
    check_group_values(engine.optimizer, engine.groups, engine.config.schedule)
    engine.optimizer.param_groups[2][name] = wrong
    with pytest.raises(CheckpointError, match=rf"after loading, {name} of the group .* the plan"):
        check_group_values(engine.optimizer, engine.groups, engine.config.schedule)
