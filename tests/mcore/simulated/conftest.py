"""These tests simulate ranks one by one, so the process must not be part of a world already."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from megatron_completedp.config.parallel import ParallelConfig
from megatron_completedp.mcore.parallel import destroy_parallel, initialize_parallel
from megatron_completedp.mcore.platform import Platform


@pytest.fixture(scope="module", autouse=True)
def one_process(platform: Platform) -> Iterator[None]:
    """Leave the one-process world of the folder above, and come back to it if we were in it."""
    was_in_world = dist.is_initialized()
    destroy_parallel()
    platform.install()
    yield
    if was_in_world:
        initialize_parallel(platform, ParallelConfig(), timeout_s=60, seed=1234)
