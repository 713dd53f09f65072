"""The weights of a Hugging Face model: safetensors files and their index, and no pickle."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_completedp.errors import ConversionError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorSpec:
    """A tensor before it is there."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Its size in a file."""
        return math.prod(self.shape) * self.dtype.itemsize


def plan_shards(specs: Iterable[TensorSpec], max_shard_bytes: int) -> dict[str, list[TensorSpec]]:
    """Which file holds which tensors, in order; a file has one tensor at least."""
    shards: list[list[TensorSpec]] = []
    for spec in specs:
        if not shards or sum(item.bytes for item in shards[-1]) + spec.bytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(spec)
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    return dict(zip(names, shards, strict=True))


def write_shards(
    folder: Path, shards: Mapping[str, Sequence[TensorSpec]], tensors: Iterator[Tensor]
) -> None:
    """Write `tensors`, which come in the order of `shards`, and the index if there are several.

    Memory: the largest file and one tensor. Raises OSError.
    """
    # One block for all files: as many small ones, freed and taken anew, leave holes in the heap
    # that grow to twice the file and more.
    room = torch.empty(
        max(sum(spec.bytes for spec in specs) for specs in shards.values()), dtype=torch.uint8
    )
    for name, specs in shards.items():
        content, start = {}, 0
        for spec in specs:
            part = room[start : start + spec.bytes].view(spec.dtype).view(spec.shape)
            content[spec.name] = part.copy_(next(tensors))
            start += spec.bytes
        try:
            save_file(content, folder / name, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, too
            raise OSError(str(error)) from error
    if len(shards) > 1:
        every = [spec for specs in shards.values() for spec in specs]
        index = {
            "metadata": {"total_size": sum(spec.bytes for spec in every)},
            "weight_map": {spec.name: name for name, specs in shards.items() for spec in specs},
        }
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class SafetensorsReader:
    """The tensors of the model in `folder`, read one at a time."""

    def __init__(self, folder: Path) -> None:
        """Raises ConversionError for missing, damaged or contradictory files."""
        self.folder = folder
        self._files = self._locate()
        self._specs = {spec.name: spec for spec in self._read_headers()}

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor, by name."""
        return self._specs

    def read(self, name: str) -> Tensor:
        """The whole tensor `name`, which is one of `specs`."""
        with safe_open(self._files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def _locate(self) -> dict[str, Path]:
        """The file of each tensor."""
        index, single = self.folder / INDEX_FILE, self.folder / SINGLE_FILE
        if not index.is_file():
            if not single.is_file():
                raise ConversionError(
                    f"{self.folder} has neither {INDEX_FILE} nor {SINGLE_FILE}; expected weights "
                    "in safetensors. Other formats can hold code that runs when they are read: "
                    "load and save the model with transformers once, where you trust it."
                )
            return dict.fromkeys(self._names_in(single), single)
        try:
            weight_map = json.loads(index.read_bytes())["weight_map"]
            files = {str(name): self.folder / str(file) for name, file in weight_map.items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ConversionError(
                f"{index} is not an index of safetensors ({error!r}); copy it again."
            ) from error
        for file in sorted(set(files.values())):
            if file.parent != self.folder or not file.is_file():
                raise ConversionError(
                    f"{file} is missing; {INDEX_FILE} says that weights are in it. Copy the model "
                    "again."
                )
            listed = {name for name, where in files.items() if where == file}
            differing = sorted(listed ^ self._names_in(file))
            if differing:
                raise ConversionError(
                    f"{file} and {INDEX_FILE} disagree on {', '.join(differing[:5])}; one of the "
                    "two is of another model. Copy the model again."
                )
        return files

    def _names_in(self, file: Path) -> set[str]:
        try:
            with safe_open(file, framework="pt") as opened:
                return set(opened.keys())
        except (SafetensorError, OSError) as error:
            raise ConversionError(
                f"{file} is damaged or incomplete ({error}); copy it again."
            ) from error

    def _read_headers(self) -> Iterator[TensorSpec]:
        for file in sorted(set(self._files.values())):
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - no mapping
                    part = opened.get_slice(name)
                    yield TensorSpec(name, tuple(part.get_shape()), _dtype(part.get_dtype(), name))


def _dtype(name: str, tensor: str) -> torch.dtype:
    known = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    if name not in known:
        raise ConversionError(
            f"{tensor} is stored as {name}; expected one of {', '.join(known)}. Quantized models "
            "cannot be converted: use the one they were made from."
        )
    return known[name]
