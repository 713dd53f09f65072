"""Run named test cases in several gloo processes, started once per test module.

Starting torch and Megatron costs seconds per process, so a module lists its cases, `run_cases`
runs all of them in one set of processes, and the tests then look at what came back:

    @pytest.fixture(scope="module")
    def results():
        return run_cases("tests.dist.my_cases", ["tp2", "pp2"], processes=2)

    def test_tp2(results):
        rank0, rank1 = results("tp2")

A case is a function without arguments in the named module. It runs on every process, with the
environment of torchrun, and its return value (anything torch.save takes) comes back per rank.
torch.distributed is started before the first case and shared by all of them.
"""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

Results = Callable[[str], list[Any]]


def run_cases(
    module: str, cases: Sequence[str], *, processes: int, timeout_s: float = 180
) -> Results:
    """Run `cases` of `module` on `processes` ranks; look results up by case name.

    The lookup raises AssertionError with the traceback of the rank where that case failed. All
    processes are killed after `timeout_s`, and cases without a result say so.
    """
    import torch

    with tempfile.TemporaryDirectory() as folder:
        outputs = _launch(module, cases, processes, Path(folder), timeout_s)
        loaded: list[dict[str, Any]] = []
        for rank in range(processes):
            path = Path(folder) / f"rank{rank}.pt"
            loaded.append(torch.load(path, weights_only=False) if path.exists() else {})

    def lookup(case: str) -> list[Any]:
        values = []
        for rank, results in enumerate(loaded):
            kind, value = results.get(case, ("missing", outputs[rank][-4000:]))
            assert kind == "value", f"{case} on rank {rank}: {kind}\n{value}"
            values.append(value)
        return values

    return lookup


def _launch(
    module: str, cases: Sequence[str], processes: int, folder: Path, timeout_s: float
) -> list[str]:
    """Start the processes, wait for them, and return what each printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs = [folder / f"rank{rank}.log" for rank in range(processes)]
    running = []
    for rank, log in enumerate(logs):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "COMPLETEDP_TEST_TIMEOUT_S": str(timeout_s),
        }
        command = [sys.executable, "-m", "tests.dist.harness", module, str(folder), *cases]
        with log.open("w") as stream:
            running.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT
                )
            )
    deadline = time.monotonic() + timeout_s
    for process in running:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return [log.read_text() for log in logs]


def _run_as_rank(module: str, folder: Path, cases: Sequence[str]) -> None:
    """Run the cases in this process; a failing case ends it, since other ranks now wait in vain."""
    import torch
    import torch.distributed as dist

    timeout_s = float(os.environ["COMPLETEDP_TEST_TIMEOUT_S"])
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
    path = folder / f"rank{dist.get_rank()}.pt"
    results: dict[str, tuple[str, Any]] = {}
    functions = importlib.import_module(module)
    for case in cases:
        try:
            results[case] = ("value", getattr(functions, case)())
        except Exception:
            results[case] = ("failed", traceback.format_exc())
        torch.save(results, path)
        if results[case][0] == "failed":
            # No clean shutdown: it would wait for the others.
            sys.stdout.flush()
            os._exit(1)
    dist.destroy_process_group()


if __name__ == "__main__":
    _run_as_rank(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
