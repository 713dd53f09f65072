"""Ratios between two runs, and the premises under which the exponents hold."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from megatron_completedp.core.ratios import Ratios, Scale, ratios_between
from megatron_completedp.errors import ConfigError

BASE = Scale(
    hidden_size=128,
    ffn_hidden_size=344,
    num_attention_heads=2,
    head_dim=64,
    num_layers=4,
    batch_tokens=2**15,
    train_tokens=2**25,
)


def test_base_to_itself_is_one() -> None:
    assert ratios_between(BASE, BASE) == Ratios()


def test_each_axis_by_hand() -> None:
    target = Scale(
        hidden_size=512,
        ffn_hidden_size=1376,
        num_attention_heads=8,
        head_dim=64,
        num_layers=12,
        batch_tokens=2**16,
        train_tokens=2**28,
    )
    ratios = ratios_between(BASE, target)
    assert ratios == Ratios(m_N=4, m_L=3, m_B=2, m_D=8)
    assert ratios.m_S == 4


def test_a_smaller_target_is_allowed() -> None:
    half = replace(BASE, hidden_size=64, ffn_hidden_size=172, num_attention_heads=1, num_layers=2)
    assert ratios_between(BASE, half) == Ratios(m_N=0.5, m_L=0.5)


def test_head_dim_must_stay() -> None:
    target = replace(BASE, head_dim=128)
    with pytest.raises(ConfigError, match=r"head_dim is 128 .* tuned at 64; .*Use the base's"):
        ratios_between(BASE, target)


def test_heads_must_grow_with_width() -> None:
    target = replace(BASE, hidden_size=256, ffn_hidden_size=688)
    with pytest.raises(ConfigError, match=r"num_attention_heads is 2 .*expected 4 heads"):
        ratios_between(BASE, target)


def test_ffn_must_grow_with_width() -> None:
    target = replace(BASE, hidden_size=256, num_attention_heads=4)
    with pytest.raises(ConfigError, match=r"ffn_hidden_size is 344, 1x .*Expected about 688"):
        ratios_between(BASE, target)


@pytest.mark.parametrize(("ffn", "accepted"), [(688, True), (704, True), (720, True), (724, False)])
def test_ffn_may_be_rounded_by_five_percent(ffn: int, accepted: bool) -> None:
    target = replace(BASE, hidden_size=256, num_attention_heads=4, ffn_hidden_size=ffn)
    if accepted:
        assert ratios_between(BASE, target).m_N == 2
    else:
        with pytest.raises(ConfigError, match=f"ffn_hidden_size is {ffn}"):
            ratios_between(BASE, target)


@pytest.mark.parametrize("field", [item.name for item in fields(Scale)])
def test_sizes_must_be_positive(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} is 0; expected at least 1"):
        replace(BASE, **{field: 0})
