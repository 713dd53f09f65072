"""The plan's memory against what the engine allocates, on one and two processes.

10 % is the promise; the largest gap seen is 4 %, under sequence parallelism.
"""

from __future__ import annotations

import pytest

pytest.importorskip("megatron.core")

from tests.dist.harness import Results, run_cases
from tests.dist.memory_cases import CASES

MODULE = "tests.dist.memory_cases"
TWO = [name for name in CASES if any(word in name for word in ("dp2", "tp2", "pp2"))]
ONE = [name for name in CASES if name not in TWO]
TOLERANCE = 0.10

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def one() -> Results:
    return run_cases(MODULE, ONE, processes=1, timeout_s=900)


@pytest.fixture(scope="module")
def two() -> Results:
    return run_cases(MODULE, TWO, processes=2, timeout_s=900)


@pytest.mark.parametrize("case", ONE)
def test_one_process(case: str, one: Results) -> None:
    (rank,) = one(case)
    assert rank["predicted"] == pytest.approx(rank["measured"], rel=TOLERANCE)


@pytest.mark.parametrize("case", TWO)
def test_two_processes(case: str, two: Results) -> None:
    for rank in two(case):
        assert rank["predicted"] == pytest.approx(rank["measured"], rel=TOLERANCE)


def test_the_measurement_sees_each_part(one: Results) -> None:
    """Negative control: without any one large part, the prediction is off by more than 10 %."""
    (rank,) = one("layers_fp32")
    for part in ("parameters", "gradients", "moments", "activations"):
        assert abs((rank["predicted"] - rank[part]) / rank["measured"] - 1) > TOLERANCE, part
    (rank,) = one("vocabulary_fp32")
    assert abs((rank["predicted"] - rank["working"]) / rank["measured"] - 1) > TOLERANCE


def test_recomputation_frees_what_it_says(one: Results) -> None:
    (without,), (with_it,) = one("layers_fp32"), one("layers_recompute")
    saved = without["measured"] - with_it["measured"]
    assert saved == pytest.approx(without["predicted"] - with_it["predicted"], rel=TOLERANCE)
