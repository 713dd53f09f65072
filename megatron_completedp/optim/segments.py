"""Which element of a tensor trains with which hyperparameters.

A fused weight holds several modules and ZeRO-1 cuts tensors anywhere, so hyperparameters belong to
element ranges, not to tensors. This module is arithmetic on such ranges; it knows no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_completedp.errors import ClassificationError, HyperparamError


@dataclass(frozen=True, kw_only=True)
class AdamWValues:
    """AdamW's five hyperparameters of a module; every segment refers to one such set."""

    lr: float
    """Peak learning rate; the schedule multiplies it by a fraction in [0, 1]."""
    weight_decay: float
    """Decoupled decay in the PyTorch convention: the learning rate multiplies it."""
    eps: float
    beta1: float
    beta2: float

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "eps"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise HyperparamError(f"AdamW's {name} is {value}; expected a number from 0 up.")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise HyperparamError(f"AdamW's {name} is {value}; expected a number in [0, 1).")


@dataclass(frozen=True)
class Segment:
    """Elements [start, stop) of a flattened tensor and the index of their set of values."""

    start: int
    stop: int
    values: int

    @property
    def length(self) -> int:
        """Number of elements."""
        return self.stop - self.start


def segments_of_shard(
    rows: Sequence[Segment], columns: int, start: int, stop: int
) -> tuple[Segment, ...]:
    """Cut the row ranges of a whole parameter to a contiguous shard of its flattened elements.

    Args:
        rows: every row of the whole parameter once, in order; counted in rows, not elements.
        columns: elements per row; 1 for a vector.
        start: first element of the shard in the flattened parameter. Need not begin a row.
        stop: one past the shard's last element; equal to `start` for an empty shard.

    Returns:
        Segments counted from the shard's first element, which cover the shard exactly once.
        Neighbours with the same values are one segment.

    Raises:
        ClassificationError: `rows` leaves a gap or overlaps, or the shard leaves the parameter.

    """
    size = (rows[-1].stop if rows else 0) * columns
    check_cover(rows, size // columns, "the row ranges of a parameter")
    if not 0 <= start <= stop <= size:
        raise ClassificationError(
            f"a shard has elements [{start}, {stop}) of a parameter with {size}; expected it to "
            "lie inside. Take the shard's bounds from the optimizer that cut it."
        )
    cut: list[Segment] = []
    for row in rows:
        left, right = max(row.start * columns, start), min(row.stop * columns, stop)
        if left >= right:
            continue
        if cut and cut[-1].values == row.values:
            left = start + cut.pop().start
        cut.append(Segment(left - start, right - start, row.values))
    return tuple(cut)


def check_cover(segments: Sequence[Segment], size: int, what: str) -> None:
    """Raise ClassificationError unless `segments`, in order, cover [0, size) exactly once."""
    end = 0
    for segment in segments:
        if segment.start != end or segment.stop <= segment.start:
            raise ClassificationError(
                f"{what}: a segment covers [{segment.start}, {segment.stop}) where one from {end} "
                "up was due. Give every element to exactly one segment, in order, none empty."
            )
        end = segment.stop
    if end != size:
        raise ClassificationError(
            f"{what}: segments end at {end} of {size}. Give every element to exactly one segment."
        )
