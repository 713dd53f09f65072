"""Processes of this machine that work on one study, and how they are stopped together.

A worker is a fresh process with one thread per rank and GPUs of its own. Whoever is asked to stop,
parent or worker, all of them save and leave.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_bool
from dataclasses import dataclass
from multiprocessing.sharedctypes import RawValue
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

from megatron_completedp.config.run import RunConfig
from megatron_completedp.errors import REQUEUE_EXIT_CODE, CompletedPError

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

#: Between looks at what others have finished.
POLL_S = 1.0

#: A forked worker would have the locks of threads that it does not have.
_SPAWN = multiprocessing.get_context("spawn")


class StudyStopped(CompletedPError):
    """A signal ended the command before its last run; started again, it goes on."""

    exit_code = REQUEUE_EXIT_CODE

    def __init__(
        self, message: str = "stopped by a signal; start the same command again to go on."
    ) -> None:
        super().__init__(message)


class Stop(Protocol):
    """The wish to stop, in memory that all processes of a crew share."""

    value: bool


class Work(Protocol):
    """What a worker does until nothing is left or `stop.value` is set; can be pickled."""

    def __call__(self, *, number: int, stop: Stop) -> None:
        """Be worker `number` of the crew."""


@dataclass(frozen=True, kw_only=True)
class Crew:
    """So many workers, and what each of them gets."""

    work: Work
    logs: Path
    """Folder for what the workers print."""
    workers: int
    ranks: int
    """Of one worker's run; that many threads and CUDA devices are a worker's own."""
    devices: Sequence[str] = ()
    """CUDA devices to share out, as CUDA_VISIBLE_DEVICES names them; without any, cores are."""
    patience: int = 0
    """Workers that may be killed, and are replaced, between two signs of progress."""

    def run(self, watch: Callable[[], bool]) -> None:
        """Start the workers and return with the last; `watch` says whether something was finished.

        Main thread only. Raises StudyStopped when a signal came, and CompletedPError for what a
        worker raised or a worker that died.
        """
        stop, errors = RawValue(c_bool, False), _SPAWN.SimpleQueue()
        self.logs.mkdir(parents=True, exist_ok=True)
        with stopping(stop):
            processes = [self._start(number, stop, errors) for number in range(self.workers)]
            dead = self._wait(processes, stop, errors, watch)
        if not errors.empty():
            raise CompletedPError(errors.get())
        if dead:
            raise CompletedPError(
                f"{', '.join(dead)} died; the logs are in {self.logs}. Start the same command "
                "again to go on."
            )
        if stop.value:
            raise StudyStopped()

    def _start(self, number: int, stop: Stop, errors: Any) -> Any:
        process = _SPAWN.Process(
            target=_be_worker,
            args=(self.work, self.logs, number, self._cores(number), stop, errors),
            name=f"worker-{number}",
        )
        with environment(ranks=self.ranks, number=number, devices=self.devices):
            process.start()
        return process

    def _cores(self, number: int) -> set[int]:
        """The cores that worker `number` is pinned to: its share of those that this process has.

        All of them for runs on GPUs, and where there are fewer than the crew has ranks.
        """
        cores = sorted(os.sched_getaffinity(0))
        if self.devices or len(cores) // self.workers < self.ranks:
            return set(cores)
        first, end = (len(cores) * each // self.workers for each in (number, number + 1))
        return set(cores[first:end])

    def _wait(
        self, processes: list[Any], stop: Stop, errors: Any, watch: Callable[[], bool]
    ) -> list[str]:
        """Watch until no worker lives.

        Returns the workers that died unasked and were not replaced; what ended one may end the
        others, so they are stopped.
        """
        dead: list[str] = []
        killed = 0
        while any(process.is_alive() for process in processes):
            time.sleep(POLL_S)
            killed = 0 if watch() else killed
            for number, process in enumerate(processes):
                if stop.value or not process.exitcode:
                    continue
                if process.exitcode < 0 and killed < self.patience:
                    killed += 1
                    logger.warning("%s was killed; it is replaced", process.name)
                    processes[number] = self._start(number, stop, errors)
                else:
                    dead = _dead(processes)
                    stop.value = True
        watch()
        return dead or (_dead(processes) if not stop.value else [])


def _dead(processes: Sequence[Any]) -> list[str]:
    return [f"{p.name} (exit code {p.exitcode})" for p in processes if p.exitcode]


def _be_worker(
    work: Work, logs: Path, number: int, cores: set[int], stop: Stop, errors: Any
) -> None:
    """The life of one worker process."""
    os.sched_setaffinity(0, cores)
    log = (logs / f"{os.uname().nodename}-{number}.log").open("a", encoding="utf-8")
    os.dup2(log.fileno(), sys.stdout.fileno())
    os.dup2(log.fileno(), sys.stderr.fileno())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        with stopping(stop):
            Thread(target=_stop_with_the_parent, args=(stop,), daemon=True).start()
            work(number=number, stop=stop)
    except StudyStopped:
        pass  # `stop` is set, and says it to whoever waits
    except CompletedPError as error:
        errors.put(str(error))
        sys.exit(1)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


@contextmanager
def stopping(stop: Stop) -> Iterator[None]:
    """Inside, the stop signals set `stop`, which parent and workers share, and do no more.

    It is plain memory: a handler that took a lock could wait for the code it interrupted. While a
    run trains here, its own handlers stand in front; it saves, and hands the signal on.
    """

    def request(*_: object) -> None:
        stop.value = True

    previous = {number: signal.signal(number, request) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _stop_with_the_parent(stop: Stop) -> None:
    """Set `stop` once this process's parent has ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    stop.value = True


@contextmanager
def environment(*, ranks: int, number: int, devices: Sequence[str]) -> Iterator[None]:
    """What worker `number` inherits; torch reads it when it is imported there."""
    changes = {"OMP_NUM_THREADS": "1"}
    if devices:
        mine = [devices[(number * ranks + rank) % len(devices)] for rank in range(ranks)]
        changes["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def visible_devices(base: RunConfig) -> list[str]:
    """The CUDA devices that runs may use, as CUDA_VISIBLE_DEVICES names them; none for CPU runs."""
    if base.training.device == "cpu":
        return []
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return [str(index) for index in range(len(listed.stdout.splitlines()))]


def worker_count(workers: int, *, ranks: int, devices: Sequence[str]) -> int:
    """`workers`; 0 of them is one for each set of `ranks` devices, or of cores without any."""
    return workers or max(1, (len(devices) or len(os.sched_getaffinity(0))) // ranks)
