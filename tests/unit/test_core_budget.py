"""Shapes and budgets: parameter counts, steps and FLOPs by hand, and refused shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from core_cases import SMALL

from megatron_completedp.core.budget import budget, model_flops_per_token
from megatron_completedp.core.roles import Module
from megatron_completedp.core.shape import ModelShape
from megatron_completedp.errors import ConfigError

#: SMALL by hand: 16 padded rows x 8; a layer has two norms of 8, two QK gains of 4, q and o 8 x 8,
#: k and v 4 x 8, and three MLP matrices 16 x 8.
EMBEDDING = 16 * 8
LAYER_MATRICES = 2 * 64 + 2 * 32 + 3 * 128
LAYER = 2 * 8 + 2 * 4 + LAYER_MATRICES


def test_parameters_by_hand() -> None:
    assert SMALL.parameters == 2 * EMBEDDING + 2 * LAYER + 8 == 1464


def test_tied_embeddings_count_once() -> None:
    tied = replace(SMALL, tied_embeddings=True)
    assert tied.parameters == SMALL.parameters - EMBEDDING
    assert budget(tied, batch_tokens=1, train_tokens=1).embedding_parameters == EMBEDDING
    assert budget(SMALL, batch_tokens=1, train_tokens=1).embedding_parameters == 2 * EMBEDDING


def test_modules_of_gated_and_plain_models() -> None:
    assert len(SMALL.modules) == 14
    plain = replace(SMALL, activation="gelu")
    assert len(plain.modules) == 13
    assert Module.GATE not in plain.modules
    assert plain.parameters == SMALL.parameters - 2 * 128


def test_qwen3_parameter_count() -> None:
    """Qwen3-0.6B's published checkpoint holds 596,049,920 parameters."""
    qwen = ModelShape(
        num_layers=28,
        hidden_size=1024,
        ffn_hidden_size=3072,
        num_attention_heads=16,
        num_query_groups=8,
        head_dim=128,
        vocab_size=151936,
        vocab_multiple=1,
        tied_embeddings=True,
        seq_length=4096,
    )
    assert qwen.parameters == 596_049_920


@pytest.mark.parametrize(("vocab", "padded"), [(1, 8), (8, 8), (9, 16), (10, 16)])
def test_vocabulary_is_padded_upwards(vocab: int, padded: int) -> None:
    assert replace(SMALL, vocab_size=vocab).padded_vocab_size == padded


def test_flops_are_six_n_d() -> None:
    """50M parameters and 1.6B tokens are the paper's 4.8e17; SMALL is the same by hand."""
    assert budget(SMALL, batch_tokens=10, train_tokens=1000).flops == 6 * 1464 * 1000
    wide = replace(SMALL, vocab_size=(50_000_000 - 2 * LAYER - 8) // 16)
    assert budget(wide, batch_tokens=1, train_tokens=1_600_000_000).flops == pytest.approx(
        4.8e17, rel=1e-3
    )


def test_model_flops_per_token_by_hand() -> None:
    """Forward: 2 per matrix weight; attention reads 3 of 6 positions on average, twice.

    Backward is twice the forward. Norm gains and the embedding look-up are no matrix products.
    """
    matrices = 2 * (2 * LAYER_MATRICES + EMBEDDING)
    attention = 2 * (
        2 * (2 * 3 * 8)
    )  # layers x (scores and values) x 2 FLOPs x keys x heads' width
    assert model_flops_per_token(SMALL) == 3 * (matrices + attention) == 8256
    assert model_flops_per_token(replace(SMALL, tied_embeddings=True)) == 8256


@pytest.mark.parametrize(("tokens", "steps"), [(1000, 10), (1001, 11), (1099, 11), (99, 1)])
def test_a_partial_batch_is_a_step(tokens: int, steps: int) -> None:
    assert budget(SMALL, batch_tokens=100, train_tokens=tokens).steps == steps


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_layers", 0, "model.num_layers is 0; expected at least 1"),
        ("head_dim", 5, "model.head_dim is 5; .* even"),
        (
            "num_query_groups",
            3,
            "num_query_groups is 3, .*num_attention_heads = 2; choose a divisor",
        ),
        ("num_query_groups", 0, "num_query_groups is 0"),
        ("activation", "relu", "model.activation is 'relu'; expected one of swiglu, gelu"),
        ("norm_epsilon", 0.0, "model.norm_epsilon is 0.0; expected a positive number"),
        ("softmax_scale", -1.0, "model.softmax_scale is -1.0; expected a positive number"),
    ],
)
def test_bad_shapes_name_the_value(field: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SMALL, **{field: value})
