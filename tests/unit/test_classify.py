"""Labels from names and shapes alone; real Megatron models are in tests/mcore/test_classify.py."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_completedp.core.roles import Module
from megatron_completedp.core.shape import ModelShape
from megatron_completedp.errors import ClassificationError, ConfigError
from megatron_completedp.mcore.classify import (
    RowRange,
    classify,
    module_shape,
)

LAYER = "decoder.layers.1."
QKV = LAYER + "self_attention.linear_qkv.weight"
FC1 = LAYER + "mlp.linear_fc1.weight"


def make_shape(**changes: Any) -> ModelShape:
    values: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 16,
        "ffn_hidden_size": 24,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "head_dim": 2,
        "vocab_size": 250,
        "seq_length": 8,
    }
    return ModelShape(**(values | changes))


def spans(ranges: tuple[RowRange, ...]) -> list[tuple[str, int, int]]:
    return [(str(rows.module), rows.start, rows.stop) for rows in ranges]


def test_fused_qkv_interleaves_per_query_group() -> None:
    # Written out by hand: 2 query heads of 2 rows, then one key and one value head, twice.
    assert spans(classify(QKV, (16, 16), make_shape(), 1)) == [
        ("q", 0, 4),
        ("k", 4, 6),
        ("v", 6, 8),
        ("q", 8, 12),
        ("k", 12, 14),
        ("v", 14, 16),
    ]


def test_a_tp_rank_sees_its_own_query_groups() -> None:
    assert spans(classify(QKV, (8, 16), make_shape(), 2)) == [
        ("q", 0, 4),
        ("k", 4, 6),
        ("v", 6, 8),
    ]


def test_multi_head_attention_interleaves_head_by_head() -> None:
    ranges = classify(QKV, (24, 16), make_shape(num_query_groups=None), 1)
    assert spans(ranges)[:4] == [("q", 0, 2), ("k", 2, 4), ("v", 4, 6), ("q", 6, 8)]
    assert len(ranges) == 3 * 4


def test_gate_comes_before_up_and_gelu_has_no_gate() -> None:
    assert spans(classify(FC1, (48, 16), make_shape(), 1)) == [("gate", 0, 24), ("up", 24, 48)]
    assert spans(classify(FC1, (24, 16), make_shape(), 2)) == [("gate", 0, 12), ("up", 12, 24)]
    assert spans(classify(FC1, (24, 16), make_shape(activation="gelu"), 1)) == [("up", 0, 24)]


@pytest.mark.parametrize(
    ("name", "local_shape", "module"),
    [
        ("embedding.word_embeddings.weight", (128, 16), Module.EMBEDDING),
        ("output_layer.weight", (128, 16), Module.UNEMBEDDING),
        ("decoder.final_layernorm.weight", (16,), Module.FINAL_NORM),
        (LAYER + "input_layernorm.weight", (16,), Module.ATTENTION_NORM),
        (LAYER + "self_attention.linear_qkv.layer_norm_weight", (16,), Module.ATTENTION_NORM),
        (LAYER + "pre_mlp_layernorm.weight", (16,), Module.MLP_NORM),
        (LAYER + "mlp.linear_fc1.layer_norm_weight", (16,), Module.MLP_NORM),
        (LAYER + "self_attention.q_layernorm.weight", (2,), Module.Q_NORM),
        (LAYER + "self_attention.k_layernorm.weight", (2,), Module.K_NORM),
        (LAYER + "self_attention.linear_proj.weight", (16, 4), Module.O),
        (LAYER + "mlp.linear_fc2.weight", (16, 12), Module.DOWN),
    ],
)
def test_single_module_tensors_at_tp_2(
    name: str, local_shape: tuple[int, ...], module: Module
) -> None:
    assert classify(name, local_shape, make_shape(), 2) == (RowRange(0, local_shape[0], module),)


def test_a_tied_output_weight_is_the_embedding() -> None:
    ranges = classify("output_layer.weight", (256, 16), make_shape(tied_embeddings=True), 1)
    assert ranges == (RowRange(0, 256, Module.EMBEDDING),)


@pytest.mark.parametrize(
    "name",
    [
        LAYER + "self_attention.linear_kv.weight",
        LAYER + "mlp.linear_fc1._extra_state",
        LAYER + "mlp.experts.linear_fc1.weight",
        "embedding.position_embeddings.weight",
        "module.output_layer.weight",
        "decoder.layers.x.mlp.linear_fc1.weight",
    ],
)
def test_an_unknown_name_stops_the_run(name: str) -> None:
    with pytest.raises(ClassificationError, match=r"\(7, 16\).*expected one of") as caught:
        classify(name, (7, 16), make_shape(), 1)
    assert name in str(caught.value)


def test_a_bias_is_refused_with_its_fix() -> None:
    with pytest.raises(ClassificationError, match="add_bias_linear=False"):
        classify(LAYER + "self_attention.linear_qkv.bias", (16,), make_shape(), 1)


@pytest.mark.parametrize("local_shape", [(16, 15), (8, 16), (16,), (17, 16)])
def test_a_wrong_shape_names_both_shapes(local_shape: tuple[int, ...]) -> None:
    with pytest.raises(ClassificationError, match=r"expected \(16, 16\) for q \+ k \+ v"):
        classify(QKV, local_shape, make_shape(), 1)


def test_a_tp_size_that_splits_a_query_group_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_query_groups is 2"):
        classify(QKV, (4, 16), make_shape(), 4)


@given(
    groups=st.integers(1, 6),
    heads_per_group=st.integers(1, 4),
    half_head_dim=st.integers(1, 8),
    tp_size=st.sampled_from([1, 2, 3]),
    activation=st.sampled_from(["swiglu", "gelu"]),
)
def test_every_row_has_one_module_and_each_module_its_share(
    groups: int, heads_per_group: int, half_head_dim: int, tp_size: int, activation: str
) -> None:
    shape = make_shape(
        num_query_groups=groups * tp_size,
        num_attention_heads=groups * tp_size * heads_per_group,
        head_dim=2 * half_head_dim,
        activation=activation,
        vocab_multiple=6,
    )
    for name, modules in {
        QKV: [Module.Q, Module.K, Module.V],
        FC1: [Module.GATE, Module.UP] if shape.gated else [Module.UP],
    }.items():
        elements = sum(shape.module_parameters(module) for module in modules)
        local_rows = elements // shape.hidden_size // tp_size
        owners: Counter[Module] = Counter()
        rows_seen: list[int] = []
        for rows in classify(name, (local_rows, shape.hidden_size), shape, tp_size):
            rows_seen += range(rows.start, rows.stop)
            owners[rows.module] += (rows.stop - rows.start) * shape.hidden_size
        assert rows_seen == list(range(local_rows))
        assert owners == {m: shape.module_parameters(m) // tp_size for m in modules}


@pytest.mark.parametrize("changes", [{}, {"activation": "gelu"}, {"num_query_groups": None}])
def test_module_shapes_have_the_sizes_the_shape_counts(changes: dict[str, Any]) -> None:
    shape = make_shape(**changes)
    for module in shape.modules:
        assert math.prod(module_shape(module, shape)) == shape.module_parameters(module)
