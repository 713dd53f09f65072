"""What one rank of a dry run has: names, sizes and places, kept after its tensors are gone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_completedp.mcore.classify import RowRange
from megatron_completedp.mcore.inventory import Inventory


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank stands on the three axes."""

    rank: int
    tp_rank: int
    pp_rank: int
    dp_rank: int

    def __str__(self) -> str:
        """For messages."""
        return f"rank {self.rank} (TP {self.tp_rank}, PP {self.pp_rank}, DP {self.dp_rank})"


@dataclass(frozen=True, kw_only=True)
class LabelledTensor:
    """A parameter as this rank holds it, without its data."""

    elements: int
    columns: int
    """Elements in a row; 1 for a vector."""
    layer: int | None
    """Global layer, from 0; None outside the stack."""
    ranges: tuple[RowRange, ...]
    """Every row exactly once, in order."""


@dataclass(frozen=True, order=True)
class Shard:
    """Elements [start, stop) of this rank's part of a parameter, flattened."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class SavedTensor:
    """A box of a global tensor that this rank writes into a checkpoint."""

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """Bytes this rank's weights and optimizer take, apart from what pads the buffers."""

    parameters: int
    gradients: int
    masters: int
    """fp32 copies of bf16 parameters."""
    moments: int
    padding: int
    """Of the buffers of weights and gradients, which align parameters and end in whole shards."""


@dataclass(frozen=True, kw_only=True)
class RankRecord:
    """One rank, built and taken apart; its own segments have been checked."""

    place: Place
    data_parallel_ranks: tuple[int, ...]
    """The ranks that hold the same part of the model, itself included, in order."""
    counts: Inventory
    tensors: Mapping[str, LabelledTensor]
    """By global name."""
    shards: tuple[tuple[Shard, ...], ...]
    """What the optimizer of each of `data_parallel_ranks` updates; the same on all of them."""
    segments: int
    """Entries in this rank's table of segments."""
    saved: tuple[SavedTensor, ...]
    """What this rank writes; the other data-parallel ranks hold copies."""
    state: StateBytes

    @property
    def elements(self) -> int:
        """Elements of the model on this rank, tied copies included."""
        return sum(tensor.elements for tensor in self.tensors.values())
