"""Train the runs of a study in several processes here, and share them with commands elsewhere.

Who trains a run holds its claim, which goes with the process, however that ends: no run is lost.
Its row is looked for again under the claim: none is trained twice. Commands on other machines share
a study through a common folder whose file system has locks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from megatron_completedp.config.load import to_yaml
from megatron_completedp.config.run import RunConfig, check_world
from megatron_completedp.data.atomic import atomic_write
from megatron_completedp.data.claims import claim
from megatron_completedp.study.crew import POLL_S, Crew, Stop, visible_devices, worker_count
from megatron_completedp.study.points import train_point
from megatron_completedp.study.results import Results

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Point:
    """One run of a study."""

    id: str
    """Names its folder, its row and its claim. Runs with the same numbers may share one."""
    config: RunConfig
    labels: Mapping[str, Any]
    """Columns of its row that say what it is."""


class Task(NamedTuple):
    """One run for a worker, which another process can read."""

    id: str
    config_file: Path
    labels: Mapping[str, Any]


def train_points(
    points: Sequence[Point], results: Results, *, folder: Path, workers: int, ranks: int
) -> None:
    """Train every point that has no row in `results`, once, and return with the last.

    `workers` of them at a time (0: one per set of `ranks` GPUs, or of cores without any), in the
    order given. `folder` gets the runs' YAML files, the claims and the workers' logs. Main thread
    only. Raises StudyStopped when a signal came, and CompletedPError for a run that could not be
    trained or a worker that died.
    """
    done = {row["id"] for row in results.rows()}
    tasks: list[Task] = []
    for point in {point.id: point for point in points if point.id not in done}.values():
        check_world(point.config, ranks)
        file = folder / f"{point.id}.yaml"
        with atomic_write(file) as stream:
            stream.write(to_yaml(point.config).encode())
        tasks.append(Task(point.id, file, point.labels))
    if not tasks:
        return
    devices = visible_devices(points[0].config)
    workers = min(worker_count(workers, ranks=ranks, devices=devices), len(tasks))
    logger.info("%d runs to train, %d at a time", len(tasks), workers)
    crew = Crew(
        work=partial(_train_tasks, tasks, results, folder, ranks),
        logs=folder / "logs",
        workers=workers,
        ranks=ranks,
        devices=devices,
    )
    crew.run(lambda: _report(tasks, results, done))


def _report(tasks: Sequence[Task], results: Results, reported: set[str]) -> bool:
    """Log the runs of `tasks` that have a row by now and are not in `reported`, and put them in.

    Returns whether there were any.
    """
    ids, before = {task.id for task in tasks}, len(reported)
    for row in results.rows():
        if row["id"] in ids - reported:
            reported.add(row["id"])
            loss = "diverged" if row["diverged"] else f"{row['loss']:.4f}"
            count = f"{len(ids & reported)} of {len(ids)}"
            logger.info("%s: %s  %s  (%.0f s)", count, row["id"], loss, row["seconds"])
    return len(reported) > before


def _train_tasks(
    tasks: Sequence[Task],
    results: Results,
    folder: Path,
    ranks: int,
    *,
    number: int,
    stop: Stop,
) -> None:
    """Be a worker: train what is free, wait while others train the rest, leave."""
    while not stop.value and (open_tasks := _without_row(tasks, results)):
        if not _train_one(open_tasks, results, folder, ranks, stop):
            time.sleep(POLL_S)


def _train_one(
    tasks: Sequence[Task], results: Results, folder: Path, ranks: int, stop: Stop
) -> bool:
    """Train the first of `tasks` that nobody else is training; False when there is none."""
    for task in tasks:
        with claim(folder / "claims" / task.id, wait=False) as claimed:
            if claimed and _without_row([task], results):
                row = train_point(task.config_file, ranks=ranks, stop=lambda: stop.value)
                if row is None:
                    stop.value = True  # the signal may have come to one of the ranks alone
                else:
                    results.append({"id": task.id, **task.labels, **row})
                return True
    return False


def _without_row(tasks: Sequence[Task], results: Results) -> list[Task]:
    done = {row["id"] for row in results.rows()}
    return [task for task in tasks if task.id not in done]
