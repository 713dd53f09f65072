"""SdpaAttention against Megatron's unfused attention, which materializes every score."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_completedp.config.parallel import ParallelConfig
from megatron_completedp.errors import ConfigError
from megatron_completedp.mcore.attention import SdpaAttention
from megatron_completedp.mcore.model import transformer_config
from tests.mcore.common import tiny_shape


def build(kind: type, config: TransformerConfig, **changes: object) -> torch.nn.Module:
    settings = {
        "config": config,
        "layer_number": 2,
        "attn_mask_type": AttnMaskType.causal,
        "attention_type": "self",
        "softmax_scale": config.softmax_scale,
    }
    return kind(**{**settings, **changes})


def config_for(groups: int, head_dim: int, scale: float | None = None) -> TransformerConfig:
    shape = tiny_shape(head_dim=head_dim, num_query_groups=groups, softmax_scale=scale)
    return transformer_config(shape, ParallelConfig(), precision="fp32")


def inputs(groups: int, head_dim: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(20, 2, heads, head_dim, generator=generator, requires_grad=True)
        for heads in (4, groups, groups)
    ]


def outputs_and_gradients(attention: torch.nn.Module, qkv: list[Tensor]) -> list[Tensor]:
    context = attention(*qkv, None)
    weights = torch.randn(context.shape, generator=torch.Generator().manual_seed(4))
    return [context, *torch.autograd.grad((context * weights).sum(), qkv)]


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("scale", [None, 0.02])
def test_equals_megatrons_unfused_attention(
    groups: int, head_dim: int, scale: float | None
) -> None:
    config = config_for(groups, head_dim, scale)
    qkv = inputs(groups, head_dim)
    expected = outputs_and_gradients(build(DotProductAttention, config), qkv)
    got = outputs_and_gradients(build(SdpaAttention, config), qkv)
    for mine, theirs in zip(got, expected, strict=True):
        # Two summation orders in fp32 over 20 keys; entries are of size 1.
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_negative_control_the_scale_matters() -> None:
    qkv = inputs(2, 32)
    scaled = build(SdpaAttention, config_for(2, 32, 0.02))(*qkv, None)
    default = build(SdpaAttention, config_for(2, 32))(*qkv, None)
    assert (scaled - default).abs().max() > 1e-2


def test_attention_is_causal() -> None:
    attention = build(SdpaAttention, config_for(2, 32))
    query, key, value = inputs(2, 32)
    changed = key.detach().clone()
    changed[10:] += 1.0
    before, after = attention(query, key, value, None), attention(query, changed, value, None)
    assert torch.equal(before[:10], after[:10])
    assert not torch.equal(before[10:], after[10:])


@pytest.mark.parametrize(
    ("field", "value"), [("attention_dropout", 0.1), ("context_parallel_size", 2)]
)
def test_settings_it_does_not_compute_are_refused(field: str, value: object) -> None:
    config = config_for(2, 32)
    setattr(config, field, value)
    with pytest.raises(ConfigError, match=f"{field} is {value}"):
        build(SdpaAttention, config)


def test_other_masks_are_refused() -> None:
    with pytest.raises(ConfigError, match="attn_mask_type"):
        build(SdpaAttention, config_for(2, 32), attn_mask_type=AttnMaskType.padding)


@pytest.mark.parametrize("name", ["attention_mask", "attention_bias", "packed_seq_params"])
def test_inputs_it_does_not_use_are_refused(name: str) -> None:
    attention = build(SdpaAttention, config_for(2, 32))
    given = {"attention_mask": None, name: torch.zeros(1)}
    with pytest.raises(ConfigError, match=f"{name} was given"):
        attention(*inputs(2, 32), **given)


def test_a_key_value_cache_is_refused() -> None:
    query, key, value = inputs(2, 32)
    with pytest.raises(ConfigError, match="1 queries and 20 keys"):
        build(SdpaAttention, config_for(2, 32))(query[-1:], key, value, None)
