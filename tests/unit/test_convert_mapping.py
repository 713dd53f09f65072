"""The conversion table: every tensor once on both sides, and each fold where it belongs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from megatron_completedp.convert.mapping import (
    ARCHITECTURES,
    MEGATRON_NAMES,
    ForwardMultipliers,
    TensorEntry,
    architecture_for,
    entries,
)
from megatron_completedp.core.hyperparams import ResidualMultiplier
from megatron_completedp.core.roles import OUTSIDE_STACK, Module
from megatron_completedp.core.shape import ModelShape
from megatron_completedp.errors import ConversionError


def shape(**changes: Any) -> ModelShape:
    return ModelShape(
        **{
            "num_layers": 3,
            "hidden_size": 64,
            "ffn_hidden_size": 96,
            "num_attention_heads": 4,
            "head_dim": 16,
            "vocab_size": 100,
            "seq_length": 8,
            **changes,
        }
    )


def by_module(
    model: ModelShape, multipliers: ForwardMultipliers
) -> dict[tuple[Module, int | None], TensorEntry]:
    return {(entry.module, entry.layer): entry for entry in entries(model, multipliers)}


def uneven(num_layers: int) -> ForwardMultipliers:
    residual = tuple(
        ResidualMultiplier(layer=i, attention=0.5 + i, mlp=0.7 - 0.1 * i) for i in range(num_layers)
    )
    return ForwardMultipliers(residual, logit=0.3)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_module_of_every_layer_has_one_tensor_of_its_own(activation: str, tied: bool) -> None:
    model = shape(activation=activation, tied_embeddings=tied)
    found = list(entries(model, ForwardMultipliers.ones(3)))
    expected = {
        (module, layer)
        for module in model.modules
        for layer in ((None,) if module in OUTSIDE_STACK else range(3))
    }
    assert {(entry.module, entry.layer) for entry in found} == expected
    assert max(Counter(entry.hf_name for entry in found).values()) == 1


def test_what_is_fused_comes_side_by_side() -> None:
    """A converter that streams reads each Megatron tensor once."""
    names = [entry.megatron_name for entry in entries(shape(), ForwardMultipliers.ones(3))]
    changes = sum(a != b for a, b in pairwise(names))
    assert changes + 1 == len(set(names))


def test_the_architectures_cover_every_activation_and_name_every_module() -> None:
    assert {item.activation for item in ARCHITECTURES} == {"swiglu", "gelu"}
    assert set(MEGATRON_NAMES) == set(Module)
    for item in ARCHITECTURES:
        assert set(item.names) == set(shape(activation=item.activation).modules)
    assert architecture_for(shape(activation="gelu")).class_name == "ApertusForCausalLM"
    assert architecture_for(shape()).class_name == "Qwen3ForCausalLM"


def test_folds_go_where_the_forward_pass_has_them() -> None:
    multipliers = uneven(3)
    model = shape(softmax_scale=1 / 16)
    found = by_module(model, multipliers)
    for layer in range(3):
        assert found[Module.O, layer].fold == multipliers.residual[layer].attention
        assert found[Module.DOWN, layer].fold == multipliers.residual[layer].mlp
        # The architecture multiplies by 1/sqrt(16) = 1/4 itself.
        assert found[Module.Q_NORM, layer].fold == 1 / 4
    assert found[Module.UNEMBEDDING, None].fold == 0.3
    folded = {Module.O, Module.DOWN, Module.Q_NORM, Module.UNEMBEDDING}
    assert all(entry.fold == 1 for key, entry in found.items() if key[0] not in folded)


def test_nothing_is_folded_at_multipliers_of_one() -> None:
    assert all(entry.fold == 1 for entry in entries(shape(), ForwardMultipliers.ones(3)))


def test_tied_embeddings_with_a_logit_multiplier_are_refused() -> None:
    model = shape(tied_embeddings=True)
    with pytest.raises(ConversionError, match=r"tied.*logits' is 0\.3.*one weight cannot hold"):
        list(entries(model, uneven(3)))
    assert list(entries(model, replace(uneven(3), logit=1.0)))


def test_multipliers_of_another_depth_are_refused() -> None:
    with pytest.raises(ConversionError, match=r"layers \[0, 1\]; expected one for each of the 3"):
        list(entries(shape(), uneven(2)))
