"""Settings shared by all tests. Imports no torch: the unit tests must not need it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Read by torch when it is first imported. One thread per process keeps timings and sums the same
# on every machine, and several processes from fighting over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def completedp_data() -> Path:
    """The folder of real text named by COMPLETEDP_DATA; skips the test without it."""
    folder = os.environ.get("COMPLETEDP_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("COMPLETEDP_DATA names no folder; set it to one with RedPajama text")
    return Path(folder)
