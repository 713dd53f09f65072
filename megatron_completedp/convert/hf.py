"""The weights of a checkpoint as those of a Hugging Face model, and back, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_completedp.convert.mapping import (
    MEGATRON_NAMES,
    ForwardMultipliers,
    TensorEntry,
    entries,
)
from megatron_completedp.convert.safetensors_folder import (
    SafetensorsReader,
    TensorSpec,
    plan_shards,
    write_shards,
)
from megatron_completedp.core.roles import Module
from megatron_completedp.core.shape import ModelShape
from megatron_completedp.errors import ConversionError
from megatron_completedp.mcore.classify import RowRange, classify, module_shape

#: Rows that are folded at a time, so that the fp32 copy of a weight stays small.
_ROWS = 4096

#: A tensor by its Megatron name.
ReadWeight = Callable[[str], Tensor]


def hf_specs(
    shape: ModelShape, multipliers: ForwardMultipliers, dtype: torch.dtype
) -> list[TensorSpec]:
    """Every tensor of the Hugging Face model of `shape`. Raises ConversionError as `entries`."""
    return [
        TensorSpec(entry.hf_name, _hf_shape(entry.module, shape), dtype)
        for entry in entries(shape, multipliers)
    ]


def hf_tensors(
    shape: ModelShape, multipliers: ForwardMultipliers, dtype: torch.dtype, read: ReadWeight
) -> Iterator[Tensor]:
    """The tensors of `hf_specs`, in that order: rows picked, factor folded in fp32, rounded once.

    Memory: one Megatron tensor, and one tensor of the result. Raises ClassificationError when a
    weight has not the shape that `shape` says.
    """
    name, whole = "", torch.empty(0)
    for entry in entries(shape, multipliers):
        if entry.megatron_name != name:
            del whole
            name, whole = entry.megatron_name, read(entry.megatron_name)
        rows = _rows_of(entry, tuple(whole.shape), shape)
        yield _fold(whole, rows, entry.fold, _hf_shape(entry.module, shape), dtype)


def write_hf_weights(
    folder: Path,
    shape: ModelShape,
    multipliers: ForwardMultipliers,
    *,
    dtype: torch.dtype,
    max_shard_bytes: int,
    read: ReadWeight,
) -> None:
    """Write the safetensors of the model into `folder`. Memory: one file's worth and one tensor."""
    shards = plan_shards(hf_specs(shape, multipliers, dtype), max_shard_bytes)
    write_shards(folder, shards, hf_tensors(shape, multipliers, dtype, read))


def megatron_weights(
    shape: ModelShape, reader: SafetensorsReader, allocate: Callable[[TensorSpec], Tensor]
) -> dict[str, Tensor]:
    """Whole Megatron tensors of a model whose multipliers are 1, filled from Hugging Face's.

    `allocate` makes room for one; its content is overwritten. Padded vocabulary rows, which count
    in the softmax of training, are the mean of the real ones: as exp is convex, n of them beside V
    tokens raise no loss by more than ln(1 + n/V), where rows of 0 would raise it by ln(1 + n/Z).

    Raises ConversionError, naming them, when tensors are missing, unknown, of another shape, or of
    several dtypes where Megatron has one tensor.
    """
    wanted = list(entries(shape, ForwardMultipliers.ones(shape.num_layers)))
    _check_tensors(reader, shape, wanted)
    weights: dict[str, Tensor] = {}
    for entry in wanted:
        spec = _megatron_spec(entry, shape, reader.specs[entry.hf_name].dtype)
        if spec.name not in weights:
            weights[spec.name] = allocate(spec).zero_()
        content, start = reader.read(entry.hf_name), 0
        for rows in _rows_of(entry, spec.shape, shape):
            part = content[start : start + rows.stop - rows.start]
            weights[spec.name][rows.start : rows.start + len(part)] = part
            start += len(part)
    _pad_vocabulary(weights, shape)
    return weights


def _pad_vocabulary(weights: dict[str, Tensor], shape: ModelShape) -> None:
    """Fill the rows of the softmax that are no token's with the mean of the others."""
    readout = Module.EMBEDDING if shape.tied_embeddings else Module.UNEMBEDDING
    table = weights[MEGATRON_NAMES[readout]]
    tokens = table[: shape.vocab_size]
    mean = sum(part.sum(0, dtype=torch.float32) for part in tokens.split(_ROWS)) / len(tokens)
    table[shape.vocab_size :] = mean


def _rows_of(
    entry: TensorEntry, megatron_shape: tuple[int, ...], shape: ModelShape
) -> list[RowRange]:
    """Where the module lies in its whole Megatron tensor, in order."""
    ranges = classify(entry.megatron_name, megatron_shape, shape, tp_size=1)
    return [rows for rows in ranges if rows.module is entry.module]


def _fold(
    whole: Tensor,
    rows: list[RowRange],
    factor: float,
    size: tuple[int, ...],
    dtype: torch.dtype,
) -> Tensor:
    """The first size[0] of the given rows, times `factor`."""
    result = torch.empty(size, dtype=dtype)
    done = 0
    for part in rows:
        for start in range(part.start, part.stop, _ROWS):
            piece = whole[start : min(start + _ROWS, part.stop)][: size[0] - done]
            result[done : done + len(piece)] = piece.float() * factor
            done += len(piece)
    assert done == size[0]
    return result


def _hf_shape(module: Module, shape: ModelShape) -> tuple[int, ...]:
    rows, *columns = module_shape(module, shape)
    if module in (Module.EMBEDDING, Module.UNEMBEDDING):
        rows = shape.vocab_size  # padding stays behind
    return (rows, *columns)


def _megatron_spec(entry: TensorEntry, shape: ModelShape, dtype: torch.dtype) -> TensorSpec:
    """The whole Megatron tensor that holds the module, with all that is fused into it."""
    fused = [
        module_shape(module, shape)
        for module in shape.modules
        if MEGATRON_NAMES[module] == MEGATRON_NAMES[entry.module]
    ]
    _, *columns = fused[0]
    return TensorSpec(entry.megatron_name, (sum(size[0] for size in fused), *columns), dtype)


def _check_tensors(reader: SafetensorsReader, shape: ModelShape, wanted: list[TensorEntry]) -> None:
    names = {entry.hf_name for entry in wanted}
    found = set(reader.specs)
    if shape.tied_embeddings:
        found.discard("lm_head.weight")  # some writers repeat the embedding here
    problems = [f"{name} is missing" for name in sorted(names - found)]
    problems += [f"{name} is unknown to this architecture" for name in sorted(found - names)]
    for entry in wanted:
        spec = reader.specs.get(entry.hf_name)
        expected = _hf_shape(entry.module, shape)
        if spec is not None and spec.shape != expected:
            problems.append(f"{entry.hf_name} has shape {spec.shape}, expected {expected}")
    problems += _mixed_dtypes(reader, wanted)
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ConversionError(
            f"{reader.folder}: {'; '.join(problems[:5])}{more}. The weights are not those of "
            "config.json; copy the model again, or correct the config."
        )


def _mixed_dtypes(reader: SafetensorsReader, wanted: list[TensorEntry]) -> list[str]:
    """What cannot be one Megatron tensor without rounding."""
    first: dict[str, TensorSpec] = {}
    problems = []
    for entry in wanted:
        spec = reader.specs.get(entry.hf_name)
        if spec is None:
            continue
        other = first.setdefault(entry.megatron_name, spec)
        if spec.dtype != other.dtype:
            problems.append(
                f"{spec.name} is {spec.dtype} and {other.name} {other.dtype}, which one Megatron "
                "weight holds together"
            )
    return problems
