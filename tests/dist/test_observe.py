"""What the checks measure is the whole model's, in every layout."""

from __future__ import annotations

import pytest

pytest.importorskip("megatron.core")

from megatron_completedp.check.probe import Record
from tests.dist.harness import Results, run_cases

CASES = "tests.dist.observe_cases"

#: fp32 sums in another order. Adam divides gradients that almost vanish by their own size, which
#: makes it more than rounding: 6e-6 was the largest difference seen over two steps.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def one() -> list[Record]:
    return run_cases(CASES, ["one"], processes=1)("one")[0]


@pytest.fixture(scope="module")
def two() -> Results:
    return run_cases(CASES, ["tp2", "pp2", "one", "built_in"], processes=2)


def table(records: list[Record]) -> dict[tuple[str, str, int | None, int], float]:
    found = {(r.quantity, r.name, r.layer, r.step): r.rms for r in records}
    assert len(found) == len(records), "measured twice"
    return found


def assert_equal(ranks: list[list[Record]], expected: list[Record]) -> None:
    for records in ranks:
        got, whole = table(records), table(expected)
        assert got.keys() == whole.keys()
        for key, value in whole.items():
            assert got[key] == pytest.approx(value, rel=TOLERANCE), key


@pytest.mark.parametrize("layout", ["tp2", "pp2", "one"])
def test_two_processes(layout: str, one: list[Record], two: Results) -> None:
    assert_equal(two(layout), one)


def test_ranks_divide_the_built_in_batch_and_measure_the_same_gradients(two: Results) -> None:
    (expected,) = run_cases(CASES, ["built_in"], processes=1)("built_in")
    gradients = {key for key in expected if key.quantity == "gradient"}
    assert gradients
    for measured in two("built_in"):
        for key in gradients:
            assert measured[key] == pytest.approx(expected[key], abs=TOLERANCE), key


@pytest.mark.slow
def test_four_processes(one: list[Record]) -> None:
    assert_equal(run_cases(CASES, ["tp2_pp2"], processes=4, timeout_s=400)("tp2_pp2"), one)


def test_a_sum_left_out_over_tensor_parallel_ranks_would_be_seen(one: list[Record]) -> None:
    """Half of each sum of o and down: sqrt(1/2) at random, far beyond the tolerance."""
    wrong = [
        Record(r.quantity, r.name, r.layer, r.step, r.rms * 0.5**0.5) if r.name == "o" else r
        for r in one
    ]
    with pytest.raises(AssertionError, match="o"):
        assert_equal([wrong], one)
