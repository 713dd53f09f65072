"""Recomputation changes what is kept for the backward pass, and nothing that is computed."""

from __future__ import annotations

import pytest
import torch

from megatron_completedp.config.parallel import ParallelConfig
from megatron_completedp.errors import ConfigError
from tests.mcore.engine_runs import run_config, run_engine


def test_losses_are_bit_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same kernels on the same inputs: no tolerance. Counted, so that layers do run again."""
    calls = []
    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, **kwargs: calls.append(None) or attention(*args, **kwargs),
    )
    plain, _ = run_engine(run_config(), stop_at=3)
    once = len(calls)
    recomputed, _ = run_engine(run_config(ParallelConfig(recompute_granularity="full")), stop_at=3)
    assert recomputed == plain
    assert len(calls) - once > once


def test_unknown_granularity() -> None:
    with pytest.raises(ConfigError, match="one of none, full"):
        ParallelConfig(recompute_granularity="selective")  # type: ignore[arg-type]
