"""The engine in one process against the same run in plain PyTorch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.utils import unwrap_model

from megatron_completedp.core.roles import Module
from megatron_completedp.mcore.engine import Engine
from tests.mcore.engine_runs import (
    STEPS,
    Trace,
    largest_difference,
    run_config,
    run_engine,
    run_oracle,
)

#: Both sides compute in fp32 (epsilon 1.2e-7) in another order; 8 steps stay within this.
TOLERANCE = 1e-6


def whole_weights(engine: Engine) -> dict[str, torch.Tensor]:
    (model,) = unwrap_model(engine.chunks)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def both(config: Any, oracle_config: Any = None) -> tuple[Trace, Trace]:
    _, weights = run_engine(config, stop_at=0, inspect=whole_weights)
    trace, _ = run_engine(config)
    return trace, run_oracle(oracle_config or config, weights)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_query_groups": 4},
        {"activation": "gelu", "num_query_groups": 1},
        {"head_dim": 64, "hidden_size": 192, "num_attention_heads": 2, "num_query_groups": None},
    ],
    ids=["gqa", "mha", "gelu_mqa", "head_dim_64"],
)
def test_eight_steps_equal_plain_pytorch(changes: dict[str, Any]) -> None:
    ours, oracle = both(run_config(model=changes))
    assert max(largest_difference(ours, oracle).values()) < TOLERANCE
    assert ours.losses[-1] < ours.losses[0] - 0.1, "the run must learn, or it compares nothing"


@pytest.mark.parametrize(
    "field", ["lr_mult", "weight_decay_mult", "eps_mult", "one_minus_beta1_mult"]
)
def test_one_wrong_hyperparameter_is_seen(field: str) -> None:
    """Negative control: 20 % on one hyperparameter of k alone, inside the fused weight, shows."""
    config = run_config()
    # Decay and eps are second-order effects in eight steps: take the module that shows most of it.
    second_order = field in ("eps_mult", "weight_decay_mult")
    module, factor = (Module.EMBEDDING, 5.0) if second_order else (Module.K, 1.2)
    types = dict(config.multipliers.types)
    right = getattr(types[module], field)
    types[module] = replace(types[module], **{field: factor * right})
    wrong = replace(config, multipliers=replace(config.multipliers, types=types))
    ours, oracle = both(wrong, config)
    assert max(largest_difference(ours, oracle).values()) > 2 * TOLERANCE


def test_bf16_follows_fp32() -> None:
    """bf16 has 8 bits of mantissa; fp32 masters and gradients keep the loss within 2e-3 of fp32."""
    fp32, _ = run_engine(run_config())
    bf16, _ = run_engine(run_config(training={"precision": "bf16"}))
    assert max(abs(a - b) / b for a, b in zip(bf16.losses, fp32.losses, strict=True)) < 2e-3
    assert bf16.losses != fp32.losses


def test_resume_is_bit_equal(tmp_path: Any) -> None:
    config = run_config()
    whole, _ = run_engine(config)
    first, _ = run_engine(config, stop_at=STEPS // 2, save_to=tmp_path)
    second, _ = run_engine(config, resume_from=tmp_path / f"step_{STEPS // 2:08d}")
    assert first.losses + second.losses == whole.losses
    assert first.grad_norms + second.grad_norms == whole.grad_norms
    assert second.evaluation == whole.evaluation
