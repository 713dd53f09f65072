"""Segments of shards: every element once, whatever the cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_completedp.errors import ClassificationError, HyperparamError
from megatron_completedp.optim.segments import AdamWValues, Segment, segments_of_shard


@st.composite
def cut_parameters(draw: st.DrawFn) -> tuple[list[Segment], int, list[int]]:
    """Row ranges of a parameter, its columns, and shard bounds from 0 to its size."""
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=8))
    sets = draw(st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths)))
    columns = draw(st.integers(1, 7))
    rows, start = [], 0
    for length, values in zip(lengths, sets, strict=True):
        rows.append(Segment(start, start + length, values))
        start += length
    size = start * columns
    cuts = draw(st.lists(st.integers(0, size), max_size=6))
    return rows, columns, [0, *sorted(cuts), size]


def expand(segments: tuple[Segment, ...], size: int) -> list[int]:
    """The set of every element; each must be given exactly once."""
    sets: list[int | None] = [None] * size
    for segment in segments:
        for element in range(segment.start, segment.stop):
            assert sets[element] is None
            sets[element] = segment.values
    assert None not in sets
    return [values for values in sets if values is not None]


@given(cut_parameters())
def test_concatenated_shards_equal_the_whole(case: tuple[list[Segment], int, list[int]]) -> None:
    rows, columns, bounds = case
    whole = [row.values for row in rows for _ in range(row.length * columns)]
    found: list[int] = []
    for start, stop in pairwise(bounds):
        found += expand(segments_of_shard(rows, columns, start, stop), stop - start)
    assert found == whole


@given(cut_parameters())
def test_neighbours_with_equal_values_are_merged(
    case: tuple[list[Segment], int, list[int]],
) -> None:
    rows, columns, bounds = case
    segments = segments_of_shard(rows, columns, bounds[1], bounds[-1])
    sets = [segment.values for segment in segments]
    assert all(a != b for a, b in pairwise(sets))


def test_a_cut_through_a_row() -> None:
    # Rows of 4 elements: q is [0, 8), k is [8, 12), q again is [12, 20).
    rows = [Segment(0, 2, 0), Segment(2, 3, 1), Segment(3, 5, 0)]
    assert segments_of_shard(rows, 4, 5, 14) == (
        Segment(0, 3, 0),
        Segment(3, 7, 1),
        Segment(7, 9, 0),
    )
    assert segments_of_shard(rows, 4, 9, 9) == ()


@pytest.mark.parametrize(
    "rows",
    [
        [Segment(0, 2, 0), Segment(3, 5, 1)],
        [Segment(0, 3, 0), Segment(2, 5, 1)],
        [Segment(1, 5, 0)],
        [Segment(0, 5, 0), Segment(5, 5, 1)],
    ],
    ids=["gap", "overlap", "late start", "empty range"],
)
def test_row_ranges_that_do_not_tile_are_refused(rows: list[Segment]) -> None:
    with pytest.raises(ClassificationError, match="exactly one segment"):
        segments_of_shard(rows, 3, 0, 15)


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 2), (0, 16)])
def test_a_shard_outside_its_parameter_is_refused(start: int, stop: int) -> None:
    with pytest.raises(ClassificationError, match="lie inside"):
        segments_of_shard([Segment(0, 5, 0)], 3, start, stop)


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", -1e-3), ("weight_decay", float("inf")), ("eps", float("nan")), ("beta1", 1.0)],
)
def test_values_out_of_range_are_refused(name: str, value: float) -> None:
    good = {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-8, "beta1": 0.9, "beta2": 0.95}
    AdamWValues(**good)
    with pytest.raises(HyperparamError, match=f"{name} is {value}"):
        AdamWValues(**{**good, name: value})
