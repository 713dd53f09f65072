"""FSDP2 on two processes trains as one process does; tests/torch_engine holds that to Megatron."""

from __future__ import annotations

import pytest

pytest.importorskip("megatron.core")
pytest.importorskip("transformers")

from megatron_completedp.torch_engine import LLAMA, QWEN3, RoleMap
from tests.dist.harness import Results, run_cases
from tests.torch_engine.runs import TOLERANCE, difference, make_plan, reference

CASES = {"fsdp2_qwen3": QWEN3, "fsdp2_llama": LLAMA}


@pytest.fixture(scope="module")
def two() -> Results:
    cases = [*CASES, "fsdp2_from_meta"]
    return run_cases("tests.dist.group_cases", cases, processes=2, timeout_s=400)


@pytest.mark.parametrize("case", CASES)
def test_fsdp2_losses_are_those_of_one_process(case: str, two: Results) -> None:
    assert_equal(two(case), CASES[case])


def test_shards_get_the_weights_of_one_process(two: Results) -> None:
    assert all(two("fsdp2_from_meta"))


def assert_equal(ranks: list[list[float]], role_map: RoleMap) -> None:
    assert ranks[0] == ranks[1]
    assert difference(ranks[0], reference(make_plan(), role_map)) < TOLERANCE
