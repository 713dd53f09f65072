"""The launcher reports a failing child with its traceback, and ends a hanging one."""

from __future__ import annotations

import time

import pytest

from tests.dist.harness import run_cases


def succeed() -> int:
    import torch.distributed as dist

    return dist.get_rank()


def fail() -> None:
    raise ValueError("deliberate")


def hang() -> None:
    time.sleep(600)


def test_results_failures_and_timeouts() -> None:
    results = run_cases("tests.dist.test_harness", ["succeed", "fail"], processes=2)
    assert results("succeed") == [0, 1]
    with pytest.raises(AssertionError, match="ValueError: deliberate"):
        results("fail")
    started = time.monotonic()
    results = run_cases("tests.dist.test_harness", ["succeed", "hang"], processes=1, timeout_s=15)
    assert time.monotonic() - started < 60
    assert results("succeed") == [0]
    with pytest.raises(AssertionError, match="hang on rank 0: missing"):
        results("hang")
