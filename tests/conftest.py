"""Settings shared by all tests. Imports no torch: the unit tests must not need it."""

from __future__ import annotations

import os
import signal

# Read by torch when it is first imported. One thread per process keeps timings and sums the same
# on every machine, and several processes from fighting over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell without job control starts what it puts into the background deaf to Ctrl-C, and every
# process from there on: the commands under test too.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
