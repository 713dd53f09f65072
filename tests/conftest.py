"""Settings shared by all tests. Imports no torch: the unit tests must not need it."""

from __future__ import annotations

import os

# Read by torch when it is first imported. One thread per process keeps timings and sums the same
# on every machine, and several processes from fighting over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
