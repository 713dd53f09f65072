"""One process of Megatron on CPU for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("megatron.core")

from megatron_completedp.config.parallel import ParallelConfig
from megatron_completedp.mcore.parallel import (
    ParallelState,
    destroy_parallel,
    initialize_parallel,
)
from megatron_completedp.mcore.platform import Platform, detect_platform


@pytest.fixture(scope="session")
def platform() -> Platform:
    return detect_platform("cpu")


@pytest.fixture(scope="session", autouse=True)
def one_process(platform: Platform) -> Iterator[ParallelState]:
    yield initialize_parallel(platform, ParallelConfig(), timeout_s=60, seed=1234)
    destroy_parallel()
