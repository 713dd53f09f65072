"""FSDP2 and ZeRO on two processes; run by `harness`, see test_groups*.py."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from megatron_completedp.core.tables import Rules
from megatron_completedp.errors import HyperparamError
from megatron_completedp.plan.run_plan import Plan
from megatron_completedp.torch_engine import (
    LLAMA,
    QWEN3,
    RoleMap,
    apply_multipliers,
    check_groups,
    init_,
    lr_scheduler,
    param_groups,
)
from tests.torch_engine.runs import STEPS, batch, hf_model, loss_of, make_plan, parametrized, train


def _mean(loss: Tensor) -> Tensor:
    dist.all_reduce(loss)
    return loss / dist.get_world_size()


def _shard(model: nn.Module) -> nn.Module:
    """FSDP2: each layer on its own, then what is left."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _ranks() -> dict[str, int]:
    return {"rank": dist.get_rank(), "size": dist.get_world_size()}


def _fsdp2(role_map: RoleMap) -> list[float]:
    plan = make_plan()
    model = _shard(parametrized(plan, role_map))
    return train(model, param_groups(model, role_map, plan), plan, mean=_mean, **_ranks())


def fsdp2_qwen3() -> list[float]:
    return _fsdp2(QWEN3)


def fsdp2_llama() -> list[float]:
    return _fsdp2(LLAMA)


def fsdp2_from_meta() -> bool:
    """Whether weights drawn into shards are those drawn whole."""
    plan = make_plan()
    whole = parametrized(plan)
    with torch.device("meta"):
        model = hf_model(plan.config.model)
    apply_multipliers(model, QWEN3, plan)
    _shard(model).to_empty(device="cpu")
    init_(model, QWEN3, plan)
    pairs = zip(model.parameters(), whole.parameters(), strict=True)
    return all(torch.equal(shards.full_tensor(), weight) for shards, weight in pairs)


# DeepSpeed is imported in its cases alone: the ones above run without it.


def zero1() -> list[float]:
    return _zero(1)


def zero2() -> list[float]:
    return _zero(2)


def zero3() -> list[float]:
    return _zero(3)


def zero2_llama() -> list[float]:
    return _zero(2, LLAMA)


def zero2_cpu_adam() -> list[float]:
    """With DeepSpeed's own Adam, which a compiler builds on first use."""
    _deepspeed()
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return _zero(2, make_optimizer=DeepSpeedCPUAdam)


def zero3_partitioned_at_birth() -> bool:
    """Whether weights drawn inside GatheredParameters are those drawn whole."""
    deepspeed = _deepspeed()
    plan = make_plan()
    with deepspeed.zero.Init(config_dict_or_path=_config(plan, 3)):
        model = hf_model(plan.config.model)
    apply_multipliers(model, QWEN3, plan)
    with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
        init_(model, QWEN3, plan)
    param_groups(model, QWEN3, plan)
    whole = parametrized(plan)
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        pairs = zip(model.parameters(), whole.parameters(), strict=True)
        return all(torch.equal(one, other) for one, other in pairs)


def zero2_levelled() -> str:
    """The complaint about a schedule of DeepSpeed's own configuration."""
    plan = make_plan()
    schedule = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": 2}}
    engine = _engine(plan, parametrized(plan), 2, scheduler=schedule)
    check_groups(engine.optimizer, plan)
    _steps(engine, plan, range(2))
    return _complaint(engine, plan)


def zero_checkpoints() -> dict[int, tuple[list[float], list[float], str]]:
    """By stage: losses after a save, after its load, and the complaint of another plan's load."""
    plan, other = make_plan(), make_plan(rules=Rules(depth_alpha=1.0))
    results = {}
    for stage in (1, 2, 3):
        folder = os.path.join(os.environ["COMPLETEDP_TEST_FOLDER"], str(stage))
        engine = _engine(plan, parametrized(plan), stage)
        _steps(engine, plan, range(2))
        engine.save_checkpoint(folder)
        after_save = _steps(engine, plan, range(2, 5))
        engine = _engine(plan, parametrized(plan), stage)
        engine.load_checkpoint(folder)
        check_groups(engine.optimizer, plan)
        after_load = _steps(engine, plan, range(2, 5))
        engine = _engine(other, parametrized(other), stage)
        engine.load_checkpoint(folder)
        results[stage] = (after_save, after_load, _complaint(engine, other))
    return results


def _complaint(engine: Any, plan: Plan) -> str:
    try:
        check_groups(engine.optimizer, plan)
    except HyperparamError as error:
        return str(error)
    return "no complaint"


def _deepspeed() -> Any:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    deepspeed.init_distributed("gloo")
    return deepspeed


def _config(plan: Plan, stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": plan.config.training.global_batch_size
        // dist.get_world_size(),
        "gradient_clipping": plan.config.training.clip_grad,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _engine(
    plan: Plan,
    model: nn.Module,
    stage: int,
    role_map: RoleMap = QWEN3,
    make_optimizer: Callable[..., Any] = torch.optim.AdamW,
    **config: Any,
) -> Any:
    deepspeed = _deepspeed()
    optimizer = make_optimizer(param_groups(model, role_map, plan))
    scheduler = None if "scheduler" in config else lr_scheduler(optimizer, plan)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        config=_config(plan, stage) | config,
    )
    return engine


def _zero(
    stage: int,
    role_map: RoleMap = QWEN3,
    make_optimizer: Callable[..., Any] = torch.optim.AdamW,
) -> list[float]:
    plan = make_plan()
    engine = _engine(plan, parametrized(plan, role_map), stage, role_map, make_optimizer)
    losses = _steps(engine, plan, range(STEPS))
    check_groups(engine.optimizer, plan)
    return losses


def _steps(engine: Any, plan: Plan, steps: Iterable[int]) -> list[float]:
    losses = []
    for step in steps:
        loss = loss_of(engine, *batch(plan, step, **_ranks()))
        engine.backward(loss)
        engine.step()
        losses.append(_mean(loss.detach()).item())
    return losses
