"""Every layout trains the same model as one process, and resumes as if it had not stopped."""

from __future__ import annotations

import pytest

pytest.importorskip("megatron.core")

from tests.dist.engine_cases import LAYOUTS
from tests.dist.harness import Results, run_cases
from tests.mcore.engine_runs import Trace, largest_difference

CASES = "tests.dist.engine_cases"
TWO = ["tp2", "tp2_sp", "pp2", "pp2_vpp2", "dp2", "dp2_overlap", "dp2_sharded"]
TWO += ["dp2_sharded_overlap"]
FOUR = ["tp2_pp2", "tp2_dp2_sharded", "pp2_vpp2_dp2_sharded"]
RESUMED = ["tp2", "pp2_vpp2", "dp2_sharded_overlap"]

#: fp32 sums in another order (epsilon 1.2e-7); eight steps stay within ten of them.
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def one() -> Results:
    return run_cases(CASES, ["train_one", "train_one_sharded"], processes=1)


@pytest.fixture(scope="module")
def two() -> Results:
    cases = [f"train_{name}" for name in TWO] + [f"resume_{name}" for name in RESUMED]
    return run_cases(CASES, cases, processes=2, timeout_s=300)


@pytest.fixture(scope="module")
def four() -> Results:
    return run_cases(CASES, [f"train_{name}" for name in FOUR], processes=4, timeout_s=300)


def assert_equal(traces: list[Trace], expected: Trace) -> None:
    for trace in traces:
        assert trace == traces[0], "every rank reports the same numbers"
    worst = largest_difference(traces[0], expected)
    assert max(worst.values()) < TOLERANCE, worst


def test_every_layout_is_tested() -> None:
    assert sorted([*TWO, *FOUR, "one", "one_sharded"]) == sorted(LAYOUTS)


def test_distributed_optimizer_on_one_process(one: Results) -> None:
    assert_equal(one("train_one_sharded"), one("train_one")[0])


@pytest.mark.parametrize("layout", TWO)
def test_two_processes(layout: str, one: Results, two: Results) -> None:
    assert_equal(two(f"train_{layout}"), one("train_one")[0])


@pytest.mark.parametrize("layout", FOUR)
def test_four_processes(layout: str, one: Results, four: Results) -> None:
    assert_equal(four(f"train_{layout}"), one("train_one")[0])


@pytest.mark.parametrize("layout", RESUMED)
def test_resume_is_bit_equal(layout: str, two: Results) -> None:
    assert two(f"resume_{layout}") == two(f"train_{layout}")
