"""Every element exactly once: checks on a dry run's records, without torch or Megatron."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from megatron_completedp.core.roles import Module
from megatron_completedp.errors import CheckpointError, ClassificationError, CompletedPError
from megatron_completedp.mcore.rank_record import LabelledTensor, RankRecord, SavedTensor, Shard
from megatron_completedp.optim.segments import AdamWValues, Segment, check_cover
from megatron_completedp.plan.memory import Memory

_REPORT = "This is a defect; please report it with the run's YAML and flags."


def check_ownership(
    tensors: Mapping[str, LabelledTensor], shards: Iterable[Shard], what: str
) -> None:
    """Raise ClassificationError unless `shards` cover every element of `tensors` exactly once.

    The shards are those of all ranks that share an optimizer's state, or of one that has all of it.
    """
    by_name: dict[str, list[Shard]] = defaultdict(list)
    for shard in shards:
        by_name[shard.name].append(shard)
    if unknown := by_name.keys() - tensors.keys():
        raise ClassificationError(
            f"{what}: the optimizer updates {min(unknown)}, which has no label."
        )
    for name, tensor in tensors.items():
        ranges = [Segment(shard.start, shard.stop, 0) for shard in sorted(by_name[name])]
        check_cover(ranges, tensor.elements, f"{what}: the optimizer's shards of {name}")


def check_segments(
    tensor: LabelledTensor,
    shard: Shard,
    segments: Sequence[Segment],
    table: Sequence[AdamWValues],
    planned: Callable[[Module, int | None], AdamWValues],
) -> None:
    """Raise ClassificationError unless each element of `shard` trains with its own module's values.

    Args:
        tensor: the parameter, with the module of every row.
        shard: the part of it that one rank updates.
        segments: the optimizer's, counted from the shard's first element.
        table: the optimizer's sets of values.
        planned: what a module of a layer is to train with, from the resolved table.

    """
    what = f"elements [{shard.start}, {shard.stop}) of {shard.name}"
    check_cover(segments, shard.stop - shard.start, what)
    for rows in tensor.ranges:
        wanted = planned(rows.module, tensor.layer)
        for segment in segments:
            first = max(rows.start * tensor.columns, shard.start + segment.start)
            last = min(rows.stop * tensor.columns, shard.start + segment.stop)
            if first < last and table[segment.values] != wanted:
                raise ClassificationError(
                    f"{what}: [{first}, {last}) are {rows.module} and would train with "
                    f"{table[segment.values]}; the resolved table has {wanted}."
                )


def check_replicas(first: RankRecord, other: RankRecord) -> None:
    """Raise ClassificationError unless two data-parallel ranks hold and share out the same."""
    for name in ("data_parallel_ranks", "tensors", "shards"):
        if getattr(first, name) != getattr(other, name):
            raise ClassificationError(
                f"{first.place} and {other.place} are data-parallel replicas, but their {name} "
                "differ. Build every rank from one configuration."
            )


def check_saved(
    saved: Iterable[SavedTensor], parameters: int, *, kinds: Collection[str]
) -> Counter[str]:
    """Elements by kind of state in a checkpoint.

    All ranks of a layout hold equal boxes of a tensor, so they must be a grid's cells, each once.

    Args:
        saved: what all ranks write.
        parameters: elements of the model.
        kinds: those that there must be: weights, exp_avg, ...

    Raises CheckpointError when an element of a tensor is saved by nobody or twice, or when the
    tensors of a kind have not as many elements as the model has `parameters`.
    """
    boxes: dict[str, list[SavedTensor]] = defaultdict(list)
    for box in saved:
        boxes[box.key].append(box)
    totals: Counter[str] = Counter()
    for key, cells in boxes.items():
        whole = math.prod(cells[0].global_shape)
        size = math.prod(cells[0].shape)
        times = max(Counter(cell.offset for cell in cells).values())
        if times > 1 or len(cells) * size != whole or not all(map(_in_grid_of(cells[0]), cells)):
            raise CheckpointError(
                f"the checkpoint's {key} of shape {cells[0].global_shape} would be written in "
                f"{len(cells)} boxes, up to {times} times each; expected {whole // size} of shape "
                f"{cells[0].shape}, each once. {_REPORT}"
            )
        totals[_kind(key)] += whole
    for kind in sorted(totals.keys() | kinds):
        elements = totals[kind]
        if elements != parameters:
            raise CheckpointError(
                f"the checkpoint's {kind} would have {elements:,} elements; the model has "
                f"{parameters:,}. {_REPORT}"
            )
    return totals


def check_memory(record: RankRecord, planned: Memory) -> None:
    """Raise CompletedPError unless `record` takes the bytes that `plan` says, to the byte.

    A sharded optimizer's masters and moments are cut where the buffer's shards end, not at equal
    numbers of parameters; theirs are compared as the mean over the data-parallel ranks, which is
    what the plan gives: the elements of the shards that all of them own.
    """
    owned = [sum(shard.stop - shard.start for shard in of) for of in record.shards]
    mine, mean = owned[record.place.dp_rank], sum(owned) / len(owned)
    state = record.state
    found = {
        "parameters": state.parameters,
        "gradients": state.gradients,
        "masters": state.masters * mean / mine if mine else planned.masters,
        "moments": state.moments * mean / mine if mine else planned.moments,
    }
    for name, value in found.items():
        expected = getattr(planned, name)
        # Quotients of whole numbers below 2^53, so that rounding is all that may differ.
        if not math.isclose(value, expected, rel_tol=1e-12):
            raise CompletedPError(
                f"{record.place} holds {value:,.0f} bytes of {name}; plan's memory model says "
                f"{expected:,.0f}. {_REPORT}"
            )


def _in_grid_of(cell: SavedTensor) -> Callable[[SavedTensor], bool]:
    """Whether a box is one of the equal boxes into which `cell` divides its tensor."""

    def is_cell(box: SavedTensor) -> bool:
        return (box.global_shape, box.shape) == (cell.global_shape, cell.shape) and all(
            first % size == 0 and first + size <= whole
            for first, size, whole in zip(box.offset, box.shape, box.global_shape, strict=True)
        )

    return is_cell


def _kind(key: str) -> str:
    """`exp_avg` of `optimizer.state.exp_avg.decoder...`; `weights` of the model's own tensors."""
    prefix = "optimizer.state."
    return key.removeprefix(prefix).split(".")[0] if key.startswith(prefix) else "weights"
