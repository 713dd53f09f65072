"""Labels of real Megatron models, against golden files written from the models themselves.

Set UPDATE_GOLDEN=1 to rewrite the files after an intended change, then read the difference.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module

from megatron_completedp.config.parallel import ParallelConfig
from megatron_completedp.core.roles import Module
from megatron_completedp.core.shape import ModelShape
from megatron_completedp.errors import ClassificationError
from megatron_completedp.mcore.classify import ClassifiedParameter, classify_model
from megatron_completedp.mcore.inventory import check_inventory, inventory, sum_inventories
from megatron_completedp.mcore.simulated_rank import build_on_meta, simulated_rank

GOLDEN = Path(__file__).parents[2] / "golden"

QWEN3_600M = ModelShape(
    num_layers=28,
    hidden_size=1024,
    ffn_hidden_size=3072,
    num_attention_heads=16,
    num_query_groups=8,
    head_dim=128,
    vocab_size=151936,
    seq_length=4096,
    tied_embeddings=True,
)
DENSE_7B = ModelShape(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    head_dim=128,
    vocab_size=50432,
    seq_length=4096,
)
GELU_MHA = ModelShape(
    num_layers=12,
    hidden_size=768,
    ffn_hidden_size=3072,
    num_attention_heads=12,
    head_dim=64,
    vocab_size=50257,
    seq_length=1024,
    activation="gelu",
)
SMALL = ModelShape(
    num_layers=8,
    hidden_size=16,
    ffn_hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=4,
    vocab_size=250,
    seq_length=8,
)


def classify_rank(
    shape: ModelShape, parallel: ParallelConfig, rank: int = 0
) -> tuple[ClassifiedParameter, ...]:
    with simulated_rank(rank, parallel.model_parallel_size, parallel):
        return classify_model(build_on_meta(shape, parallel), shape, parallel)


def render(parameters: Sequence[ClassifiedParameter]) -> str:
    """One entry per tensor; a run of equal layers is written once, as `decoder.layers.[0-27]`."""

    def entry(item: ClassifiedParameter) -> str:
        rows = " ".join(f"{r.module}:{r.start}-{r.stop}" for r in item.ranges)
        name = item.global_name.replace(f"layers.{item.layer}.", "layers.*.")
        split = f"tp dim {item.partition_dim}" if item.partition_dim is not None else "tp copy"
        head = f"{name} {tuple(item.parameter.shape)} {split}\n"
        return head + textwrap.fill(rows, 96, initial_indent="    ", subsequent_indent="    ")

    layers = [
        (layer, "\n".join(map(entry, items)))
        for layer, items in groupby(parameters, key=lambda item: item.layer)
    ]
    blocks = []
    for text, run in groupby(layers, key=lambda pair: pair[1]):
        numbers = [layer for layer, _ in run]
        blocks.append(text.replace("layers.*.", f"layers.[{numbers[0]}-{numbers[-1]}]."))
    return "\n".join(blocks) + "\n"


@pytest.mark.parametrize(
    ("name", "shape", "tp_size"),
    [("qwen3_600m", QWEN3_600M, 1), ("dense_7b", DENSE_7B, 8), ("gelu_mha", GELU_MHA, 2)],
)
def test_labels_match_the_golden_inventory(name: str, shape: ModelShape, tp_size: int) -> None:
    parameters = classify_rank(shape, ParallelConfig(tensor_model_parallel_size=tp_size))
    text = render(parameters)
    path = GOLDEN / f"inventory_{name}_tp{tp_size}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="ascii")
    assert text == path.read_text(encoding="ascii")
    # The TP ranks of one stage are alike, so one rank's inventory stands for each.
    total = sum_inventories(dict.fromkeys(((0, t) for t in range(tp_size)), inventory(parameters)))
    check_inventory(total, shape)


def test_the_qwen3_600m_total_is_the_published_one() -> None:
    # 596,049,920 is the parameter count of the published Qwen3-0.6B, whose vocabulary is a
    # multiple of 128 already.
    parameters = classify_rank(QWEN3_600M, ParallelConfig())
    assert sum(inventory(parameters).values()) == 596_049_920


def test_layers_are_numbered_over_all_stages_and_chunks() -> None:
    parallel = ParallelConfig(
        pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2
    )
    # The interleaved schedule deals chunks out in turn: two layers to stage 0, two to stage 1.
    for rank, layers in enumerate([[0, 1, 4, 5], [2, 3, 6, 7]]):
        parameters = classify_rank(SMALL, parallel, rank)
        found = [item.layer for item in parameters if item.ranges[0].module is Module.DOWN]
        assert found == layers
        names = {item.global_name for item in parameters}
        assert {f"decoder.layers.{layer}.mlp.linear_fc2.weight" for layer in layers} <= names
        assert len(names) == len(parameters)


def test_the_last_stage_labels_its_copy_of_a_tied_embedding() -> None:
    shape = ModelShape(**{**vars(SMALL), "tied_embeddings": True})
    parameters = classify_rank(shape, ParallelConfig(pipeline_model_parallel_size=2), rank=1)
    copies = [item for item in parameters if item.is_tied_copy]
    assert [item.global_name for item in copies] == ["output_layer.weight"]
    assert (Module.EMBEDDING, None) not in inventory(parameters)


def test_wrapped_chunks_have_the_labels_of_bare_ones() -> None:
    parallel = ParallelConfig()
    with simulated_rank(0, 1, parallel):
        (model,) = build_on_meta(SMALL, parallel)
        bare = classify_model([model], SMALL, parallel)
        model = model.to_empty(device="cpu")  # DDP flattens parameters into real buffers
        wrapped = DistributedDataParallel(
            model.config, DistributedDataParallelConfig(), Float16Module(model.config, model)
        )
        names = [name for name, _ in wrapped.named_parameters()]
        labels = classify_model([wrapped], SMALL, parallel)
    assert all(name.startswith("module.module.") for name in names), "not the wrappers we expect"
    assert [(item.global_name, item.ranges) for item in labels] == [
        (item.global_name, item.ranges) for item in bare
    ]


def test_a_parameter_without_a_module_stops_the_run() -> None:
    parallel = ParallelConfig()
    with simulated_rank(0, 1, parallel):
        (model,) = build_on_meta(SMALL, parallel)
        model.decoder.layers[3].mlp.temperature = torch.nn.Parameter(torch.ones(5))
        with pytest.raises(ClassificationError, match=r"layers\.3\.mlp\.temperature.*\(5,\)"):
            classify_model([model], SMALL, parallel)


def test_a_lost_tensor_parallel_mark_stops_the_run() -> None:
    # Without the mark a shard counts as a copy, and the gradient norm misses half of it.
    parallel = ParallelConfig(tensor_model_parallel_size=2)
    with simulated_rank(0, 2, parallel):
        (model,) = build_on_meta(SMALL, parallel)
        model.decoder.layers[0].mlp.linear_fc2.weight.tensor_model_parallel = False
        with pytest.raises(ClassificationError, match=r"linear_fc2.*dimension None.*expected 1"):
            classify_model([model], SMALL, parallel)
