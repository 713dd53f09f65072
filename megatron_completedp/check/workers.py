"""Train the runs of a study in several processes here, and share them with commands elsewhere.

Who trains a run holds its claim, which goes with the process, however that ends: no run is lost.
Its row is looked for again under the claim: none is trained twice. Commands on other machines share
a study through a common folder whose file system has locks.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from ctypes import c_bool
from dataclasses import dataclass
from multiprocessing.sharedctypes import RawValue
from pathlib import Path
from threading import Thread
from typing import Any

from megatron_completedp.data.claims import claim
from megatron_completedp.errors import REQUEUE_EXIT_CODE, CompletedPError
from megatron_completedp.study.points import train_point
from megatron_completedp.study.results import Results

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

#: Between looks at what others have finished.
POLL_S = 1.0


class StudyStopped(CompletedPError):
    """A signal ended the command before its last run; started again, it goes on."""

    exit_code = REQUEUE_EXIT_CODE


@dataclass(frozen=True)
class Task:
    """One run for a worker."""

    id: str
    """Of its row and its claim."""
    config_file: Path
    labels: Mapping[str, Any]
    """Columns of its row that say what it is."""


def run_tasks(
    tasks: Sequence[Task],
    results: Results,
    *,
    folder: Path,
    workers: int,
    ranks: int,
    devices: Sequence[str],
) -> None:
    """Train every task that has no row in `results`, by `workers` processes; return with the last.

    Tasks are taken in the order given. `folder` gets the claims and the workers' logs. Each worker
    sees `ranks` of the CUDA `devices`, if there are any, and computes with one thread per rank.
    Main thread only. Raises StudyStopped when a signal came, and CompletedPError for a run that
    could not be trained or a worker that died.
    """
    context = multiprocessing.get_context("spawn")
    stop, errors = RawValue(c_bool, False), context.SimpleQueue()
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    processes = []
    with _stopping(stop):
        for number in range(workers):
            process = context.Process(
                target=_work,
                args=(tasks, results, folder, number, ranks, stop, errors),
                name=f"worker-{number}",
            )
            with _environment(ranks=ranks, number=number, devices=devices):
                process.start()
            processes.append(process)
        dead = _wait(processes, tasks, results, stop)
    if not errors.empty():
        raise CompletedPError(errors.get())
    if dead:
        raise CompletedPError(
            f"{', '.join(dead)} died; the logs are in {folder / 'logs'}. Start the same command "
            "again to go on."
        )
    if stop.value:
        raise StudyStopped("stopped by a signal; start the same command again to go on.")


def _wait(
    processes: Sequence[Any], tasks: Sequence[Task], results: Results, stop: Any
) -> list[str]:
    """Report finished runs until no worker lives.

    Returns the workers that died unasked; what ended one may end the others, so they are stopped.
    """
    dead: list[str] = []
    reported = {row["id"] for row in results.rows()}
    while any(process.is_alive() for process in processes):
        time.sleep(POLL_S)
        if not stop.value:
            dead = _dead(processes)
            stop.value = bool(dead)
        _report(tasks, results, reported)
    return dead or (_dead(processes) if not stop.value else [])


def _dead(processes: Sequence[Any]) -> list[str]:
    return [f"{p.name} (exit code {p.exitcode})" for p in processes if p.exitcode]


def _report(tasks: Sequence[Task], results: Results, reported: set[str]) -> None:
    """Log the runs of `tasks` that have a row by now and are not in `reported`, and put them in."""
    ids = {task.id for task in tasks}
    for row in results.rows():
        if row["id"] in ids - reported:
            reported.add(row["id"])
            loss = "diverged" if row["diverged"] else f"{row['loss']:.4f}"
            count = f"{len(ids & reported)} of {len(ids)}"
            logger.info("%s: %s  %s  (%.0f s)", count, row["id"], loss, row["seconds"])


def _work(
    tasks: Sequence[Task],
    results: Results,
    folder: Path,
    number: int,
    ranks: int,
    stop: Any,
    errors: Any,
) -> None:
    """The life of one worker: train what is free, wait while others train the rest, leave."""
    log = (folder / "logs" / f"{os.uname().nodename}-{number}.log").open("a", encoding="utf-8")
    os.dup2(log.fileno(), sys.stdout.fileno())
    os.dup2(log.fileno(), sys.stderr.fileno())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    with _stopping(stop) as request:
        Thread(target=_stop_the_run, args=(stop, request), daemon=True).start()
        try:
            while not stop.value and (open_tasks := _without_row(tasks, results)):
                if not _train_one(open_tasks, results, folder, ranks, stop):
                    time.sleep(POLL_S)
        except CompletedPError as error:
            errors.put(str(error))
            sys.exit(1)
        except Exception:
            traceback.print_exc()
            sys.exit(1)


def _stop_the_run(stop: Any, request: Any) -> None:
    """Once `stop` is set, signal this process as soon as a run's handlers stand before `request`.

    Whoever asked, this process heard of it while it had no run that could save, or did not hear of
    it at all. A run takes signals that come at almost the same time for one.
    """
    while not (stop.value and signal.getsignal(signal.SIGTERM) is not request):
        time.sleep(POLL_S / 4)
    os.kill(os.getpid(), signal.SIGTERM)


def _train_one(
    tasks: Sequence[Task], results: Results, folder: Path, ranks: int, stop: Any
) -> bool:
    """Train the first of `tasks` that nobody else is training; False when there is none."""
    for task in tasks:
        with claim(folder / "claims" / task.id, wait=False) as claimed:
            if claimed and _without_row([task], results):
                row = train_point(task.config_file, ranks=ranks)
                if row is None:
                    stop.value = True  # the signal may have come to this process alone
                else:
                    results.append({"id": task.id, **task.labels, **row})
                return True
    return False


def _without_row(tasks: Sequence[Task], results: Results) -> list[Task]:
    done = {row["id"] for row in results.rows()}
    return [task for task in tasks if task.id not in done]


@contextmanager
def _stopping(stop: Any) -> Iterator[Callable[..., None]]:
    """Inside, the stop signals set `stop`, which parent and workers share, and do no more.

    It is plain memory: a handler that took a lock could wait for the code it interrupted. While a
    run trains, its own handlers stand in front and it saves. Yields the handler.
    """

    def request(*_: object) -> None:
        stop.value = True

    previous = {number: signal.signal(number, request) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _environment(*, ranks: int, number: int, devices: Sequence[str]) -> Iterator[None]:
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
