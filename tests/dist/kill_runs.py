"""Kills a run of two processes again and again: `python -m tests.dist.kill_runs`.

Torch and Megatron are imported once, and each life of the run is two processes forked from here
into a process group of their own, which SIGKILL ends as a whole, writers included. Prints one JSON
object, see `main`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_completedp.config.load import load_config
from megatron_completedp.data.jsonl import read_whole_rows
from megatron_completedp.errors import CompletedPError
from megatron_completedp.mcore.checkpoint_info import read_table
from megatron_completedp.mcore.manifest import verify
from megatron_completedp.mcore.store import list_checkpoints, step_of
from megatron_completedp.plan.run_plan import Plan
from megatron_completedp.train import start as _imported_before_the_forks  # noqa: F401
from megatron_completedp.train.__main__ import main as train

RANKS = 2


class Life:
    """One start of the run."""

    def __init__(self, config: Path, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.group = 0
        self.processes = []
        for rank in range(RANKS):
            process = os.fork()
            if process == 0:
                _be_rank(rank, port, self.group, config, log)
            self.group = self.group or process
            os.setpgid(process, self.group)  # here and there: whichever comes first
            self.processes.append(process)

    def kill(self) -> None:
        """SIGKILL to every process at once."""
        os.killpg(self.group, signal.SIGKILL)

    def codes(self) -> list[int]:
        """Wait; the exit codes by rank, negative for a signal."""
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.processes]


def _be_rank(rank: int, port: int, group: int, config: Path, log: Path) -> None:
    """The rest of a forked process; never returns."""
    code = 70
    try:
        os.setpgid(0, group)
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(RANKS),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        code = train(["--config", str(config)])
    except CompletedPError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def train_steps(folder: Path) -> list[int]:
    """The steps in the run's metrics."""
    rows = read_whole_rows(folder / "metrics.jsonl")
    return [row["step"] for row in rows if row["kind"] == "train"]


def newest_step(folder: Path) -> int:
    """Of the newest checkpoint; 0 for none. Raises CheckpointError unless it verifies."""
    found = list_checkpoints(folder / "checkpoints")
    if not found:
        return 0
    verify(found[-1])
    return step_of(found[-1])


def has_step(folder: Path, after: int) -> bool:
    """Whether a step beyond `after` is in the metrics."""
    return max(train_steps(folder), default=0) > after


def is_saving(folder: Path) -> bool:
    """Whether a checkpoint is being written, or was when the run was killed."""
    return any((folder / "checkpoints").glob(".writing_*"))


def wait_until(condition: Callable[[], bool], timeout_s: float = 120) -> None:
    """Look every few milliseconds. Raises TimeoutError."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"it did not happen within {timeout_s} s")
        time.sleep(0.003)


def live_and_die(config: Path, log: Path, after: str, delay_s: float) -> dict[str, Any]:
    """Start the run and kill it `delay_s` after its `start`, its first `step` or a `save`'s start.

    Returns what was there before and after.
    """
    run = load_config(config)
    folder = Path(run.run_dir)
    before = newest_step(folder)
    life = Life(config, log)
    if after != "start":
        wait_until(lambda: has_step(folder, before))
    if after == "save":
        wait_until(lambda: is_saving(folder))
    time.sleep(delay_s)
    life.kill()
    life.codes()
    reported = max(train_steps(folder), default=0)
    planned = json.loads(json.dumps(Plan.of(run).resolved.as_json()))
    checkpoints = list_checkpoints(folder / "checkpoints")
    return {
        "before": before,
        "after": newest_step(folder),
        "reported": reported,
        "saving": is_saving(folder),
        "same_hyperparams": all(read_table(path) == planned for path in checkpoints),
        "kept": len(checkpoints),
    }


def shard_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every shard of the newest checkpoint."""
    newest = list_checkpoints(folder / "checkpoints")[-1]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in newest.glob("*.distcp")}


def main() -> None:
    """Run one config undisturbed, and its twin with kills until none is left.

    Prints {"kills": [see live_and_die], "codes": of the last lives, "equal_shards", "seconds"}.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("undisturbed", type=Path)
    parser.add_argument("killed", type=Path)
    parser.add_argument("--kills", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    arguments = parser.parse_args()
    log = arguments.killed.with_suffix(".log")
    began = time.monotonic()
    runs = [load_config(config) for config in (arguments.undisturbed, arguments.killed)]
    folders = [Path(run.run_dir) for run in runs]
    life = Life(arguments.undisturbed, log)
    wait_until(lambda: has_step(folders[0], 0))
    first = time.monotonic()
    codes = life.codes()
    # The time from one save to the next, so that fast machines and slow ones kill alike.
    cycle_s = (time.monotonic() - first) / (runs[0].steps / runs[0].checkpoint.interval)
    generator = random.Random(arguments.seed)
    kills = []
    for number in range(arguments.kills):
        after = ("step", "save", "step", "save", "start")[number % 5]
        bounds_s = {
            "step": (cycle_s, 3 * cycle_s),
            "save": (0, cycle_s / 2),
            "start": (0, first - began),
        }
        delay_s = generator.uniform(*bounds_s[after])
        kills.append(live_and_die(arguments.killed, log, after, delay_s))
    codes += Life(arguments.killed, log).codes()
    report = {
        "kills": kills,
        "codes": codes,
        "equal_shards": shard_hashes(folders[0]) == shard_hashes(folders[1]),
        "seconds": round(time.monotonic() - began, 1),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
