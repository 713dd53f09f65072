"""Hugging Face weights as Megatron's: padded rows, dtypes, and disks without room."""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

pytest.importorskip("megatron.core")
pytest.importorskip("transformers")

from megatron_completedp.convert import load
from megatron_completedp.convert.folder import whole_folder
from megatron_completedp.convert.hf import hf_specs, megatron_weights
from megatron_completedp.convert.hf_config import write_config
from megatron_completedp.convert.load import from_hf
from megatron_completedp.convert.mapping import MEGATRON_NAMES, ForwardMultipliers
from megatron_completedp.convert.safetensors_folder import (
    SafetensorsReader,
    TensorSpec,
    plan_shards,
    write_shards,
)
from megatron_completedp.core.roles import Module
from megatron_completedp.core.shape import ModelShape
from megatron_completedp.errors import ConversionError
from tests.mcore.common import tiny_shape

PADDED = 128


def room(spec: TensorSpec) -> torch.Tensor:
    return torch.empty(spec.shape, dtype=spec.dtype)


def write_model(
    folder: Path, shape: ModelShape, dtypes: dict[str, torch.dtype] | None = None
) -> None:
    """Random weights, of which the readout's have a mean."""
    torch.manual_seed(0)
    folder.mkdir()
    specs = [
        TensorSpec(spec.name, spec.shape, (dtypes or {}).get(spec.name, spec.dtype))
        for spec in hf_specs(shape, ForwardMultipliers.ones(shape.num_layers), torch.bfloat16)
    ]
    tensors = (torch.randn(spec.shape) / 4 + 0.25 * (spec.shape[0] == 100) for spec in specs)
    write_shards(folder, plan_shards(specs, 10**9), tensors)
    write_config(folder, shape, dtype=torch.bfloat16, eod=0)


@pytest.mark.parametrize("tied", [False, True])
def test_padded_rows_raise_no_loss_by_more_than_their_share(tied: bool, tmp_path: Path) -> None:
    """Where z-loss has brought all logits down, rows of zeros would be most of the softmax."""
    shape = tiny_shape(vocab_size=100, vocab_multiple=PADDED, tied_embeddings=tied)
    write_model(tmp_path / "hf", shape)
    weights = megatron_weights(shape, SafetensorsReader(tmp_path / "hf"), room)
    table = weights[MEGATRON_NAMES[Module.EMBEDDING if tied else Module.UNEMBEDDING]].float()
    assert table.shape[0] == PADDED
    states = torch.randn(table.shape[1], 64)
    states -= states.mean(0) + 0.5  # logits below 0, as the readout's rows have a positive mean

    def raised(rows: torch.Tensor) -> torch.Tensor:
        return (rows @ states).logsumexp(0) - (rows[:100] @ states).logsumexp(0)

    share = math.log(PADDED / 100)
    assert raised(table).max() < share + 1e-3  # the mean is rounded to bf16
    zeros = table.clone()
    zeros[100:] = 0
    assert raised(zeros).max() > 2 * share, "the test would not see rows of zeros"


def test_weights_of_several_dtypes_in_one_are_refused(tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    write_model(tmp_path / "hf", tiny_shape(), {name: torch.float32})
    with pytest.raises(ConversionError, match=r"k_proj\.weight is torch.float32 and .*q_proj"):
        from_hf(tmp_path / "hf", tmp_path / "back")


def test_tensors_that_megatron_keeps_apart_may_differ_in_dtype(tmp_path: Path) -> None:
    """Negative control: gains in fp32 beside weights in bf16 stay as they are."""
    shape = tiny_shape()
    write_model(tmp_path / "hf", shape, {"model.norm.weight": torch.float32})
    weights = megatron_weights(shape, SafetensorsReader(tmp_path / "hf"), room)
    assert weights[MEGATRON_NAMES[Module.FINAL_NORM]].dtype == torch.float32


# A full disk. The limit on the size of a file stands for it: both fail in the call that writes.


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_safetensors_without_room_are_an_error_of_the_conversion(tmp_path: Path) -> None:
    specs = [TensorSpec("weight", (1000, 100), torch.float32)]
    with (
        pytest.raises(ConversionError, match="make room there"),
        files_of_at_most(50_000),
        whole_folder(tmp_path / "hf") as folder,
    ):
        write_shards(folder, plan_shards(specs, 10**9), iter([torch.ones(1000, 100)]))
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_without_room_is_an_error_of_the_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "hf", tiny_shape())
    monkeypatch.setattr(load, "_Mapped", lambda _: room)  # Megatron's writer is to be the first
    with pytest.raises(ConversionError, match="make room there"), files_of_at_most(20_000):
        from_hf(tmp_path / "hf", tmp_path / "back")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_room_for_mapped_weights_is_taken_before_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sparse file's page that finds no room kills the process by SIGBUS, which no test can."""

    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    write_model(tmp_path / "hf", tiny_shape())
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ConversionError, match=r"No space left.*make room there"):
        from_hf(tmp_path / "hf", tmp_path / "back")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
