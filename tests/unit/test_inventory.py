"""Inventories add up over a replica, and what is lost or counted twice is named."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_completedp.core.roles import OUTSIDE_STACK, Module
from megatron_completedp.core.shape import ModelShape
from megatron_completedp.errors import ClassificationError
from megatron_completedp.mcore.classify import (
    ClassifiedParameter,
    RowRange,
    module_shape,
    partition_dim,
)
from megatron_completedp.mcore.inventory import (
    Inventory,
    check_inventory,
    inventory,
    sum_inventories,
)

SHAPE = ModelShape(
    num_layers=2,
    hidden_size=16,
    ffn_hidden_size=24,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=2,
    vocab_size=250,
    seq_length=8,
)


def fake_rank(layer: int, outer: set[Module]) -> list[ClassifiedParameter]:
    """One layer of a TP pair, and the modules `outer`; one unfused parameter for each module."""
    held: list[tuple[Module, int | None]] = [(module, None) for module in outer]
    held += [(module, layer) for module in SHAPE.modules if module not in OUTSIDE_STACK]
    parameters = []
    for module, at in held:
        size = list(module_shape(module, SHAPE))
        split = partition_dim(module)
        if split is not None:
            size[split] //= 2
        parameters.append(
            ClassifiedParameter(
                parameter=SimpleNamespace(shape=tuple(size)),  # type: ignore[arg-type]
                global_name=f"{module}.{at}",
                layer=at,
                ranges=(RowRange(0, size[0], module),),
                partition_dim=split,
            )
        )
    return parameters


def fake_replica() -> dict[tuple[int, int], Inventory]:
    """TP 2 x PP 2, one layer per stage."""
    outer = [{Module.EMBEDDING}, {Module.FINAL_NORM, Module.UNEMBEDDING}]
    return {
        (stage, tp_rank): inventory(fake_rank(stage, outer[stage]))
        for stage in range(2)
        for tp_rank in range(2)
    }


def test_a_replica_sums_to_the_model_with_gains_counted_once() -> None:
    total = sum_inventories(fake_replica())
    check_inventory(total, SHAPE)
    assert sum(total.values()) == SHAPE.parameters
    assert total[Module.ATTENTION_NORM, 0] == SHAPE.hidden_size


def test_a_lost_layer_is_listed() -> None:
    ranks = {
        key: {owner: count for owner, count in counts.items() if owner[1] != 1}
        for key, counts in fake_replica().items()
    }
    with pytest.raises(ClassificationError, match=r"down of layer 1: 0 elements, expected 384"):
        check_inventory(sum_inventories(ranks), SHAPE)


def test_a_stage_built_twice_is_listed() -> None:
    ranks = fake_replica()
    ranks |= {(2, tp_rank): ranks[1, tp_rank] for tp_rank in range(2)}
    with pytest.raises(ClassificationError, match="unembedding: 8,192 elements, expected 4,096"):
        check_inventory(sum_inventories(ranks), SHAPE)


def test_a_gain_lost_on_one_tp_rank_is_seen() -> None:
    ranks = fake_replica()
    # A plain sum could not see this one: gains are counted on TP rank 0 alone.
    ranks[1, 1] = {key: n for key, n in ranks[1, 1].items() if key[0] is not Module.Q_NORM}
    with pytest.raises(ClassificationError, match="Pipeline rank 1: only one of TP ranks 0 and 1"):
        sum_inventories(ranks)


def test_the_copy_of_a_tied_embedding_is_not_counted() -> None:
    ranges = (RowRange(0, 256, Module.EMBEDDING),)
    first, copy = (
        ClassifiedParameter(
            parameter=SimpleNamespace(shape=(256, 16)),  # type: ignore[arg-type]
            global_name=name,
            layer=None,
            ranges=ranges,
            partition_dim=0,
        )
        for name in ("embedding.word_embeddings.weight", "output_layer.weight")
    )
    assert inventory([copy]) == {}
    assert inventory([first]) == {(Module.EMBEDDING, None): 256 * 16}
