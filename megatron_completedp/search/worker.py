"""A worker of a search: takes trials, trains them, enters what they found, until all have ended.

Any number of workers, on any number of machines, may come and go; they share the study's database
and the output folder.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from ctypes import c_bool
from functools import partial
from multiprocessing.sharedctypes import RawValue
from pathlib import Path
from typing import Any

from megatron_completedp.config.load import build, to_tree
from megatron_completedp.data.claims import claim
from megatron_completedp.errors import CompletedPError
from megatron_completedp.search.access import Search
from megatron_completedp.search.objective import Facts
from megatron_completedp.search.outage import heartbeat, persist
from megatron_completedp.search.progress import Progress
from megatron_completedp.search.pruning import Pruner
from megatron_completedp.search.queue import Queue, Taken
from megatron_completedp.search.settings import DatabaseSettings, SearchSettings, database_url
from megatron_completedp.search.trust_rules import Rules
from megatron_completedp.study.crew import (
    POLL_S,
    Crew,
    Stop,
    StudyStopped,
    environment,
    stopping,
    visible_devices,
    worker_count,
)

logger = logging.getLogger(__name__)


def run(search: Search) -> None:
    """Train the search's trials by workers of this machine, until the last one has ended.

    A worker that is killed is replaced. Main thread only. Raises StudyStopped when a signal came,
    CompletedPError for what a worker raised.
    """
    settings = search.settings
    stop: Stop = RawValue(c_bool, False)
    with stopping(stop):
        queue = search.join("parent", stop)
    if stop.value:
        raise StudyStopped()
    devices = visible_devices(queue.objective.base)
    workers = worker_count(settings.workers, ranks=settings.ranks, devices=devices)
    logger.info("%d trials, %d at a time; logs in %s", settings.trials, workers, search.out)
    round_size = settings.sampler_options.get("round_size", Rules.round_size)
    if settings.sampler == "trust_region" and workers > round_size:
        logger.warning(
            "%d workers, but round_size is %d: rounds overlap, and the region hardly moves; give "
            "sampler_options.round_size of at least as many",
            workers,
            round_size,
        )
    crew = Crew(
        # Plain data: the settings' read-only mappings cannot be pickled.
        work=partial(_crew_member, to_tree(settings), search.out),
        logs=search.out / "logs",
        workers=workers,
        ranks=settings.ranks,
        devices=devices,
        patience=workers * (settings.retries + 1),
    )
    crew.run(Progress(queue, settings.database).look)
    trials = persist(lambda: queue.study.get_trials(deepcopy=False), settings.database)
    if lost := queue.given_up(trials):
        logger.warning(
            "%d trials have no result, since each of their %d tries was lost: %s; see the logs",
            len(lost),
            settings.retries + 1,
            ", ".join(map(str, lost)),
        )


def work(search: Search) -> None:
    """Be one worker, in this process and with the GPUs that it sees, until every trial has ended.

    Main thread only. Raises StudyStopped when a signal came.
    """
    _warn_of_sqlite_in_an_array(search)
    stop: Stop = RawValue(c_bool, False)
    name = f"{os.uname().nodename}-{os.getpid()}"
    ranks = search.settings.ranks
    with environment(ranks=ranks, number=0, devices=()), stopping(stop):
        _work(search, name, stop)
    if stop.value:
        raise StudyStopped()


def _warn_of_sqlite_in_an_array(search: Search) -> None:
    """SQLite's locks do not hold over NFS, and no task knows on which machines others are."""
    tasks = os.environ.get("SLURM_ARRAY_TASK_COUNT", "1")
    url = database_url(search.settings, search.out)
    if tasks.isdecimal() and int(tasks) > 1 and url.startswith("sqlite"):
        logger.warning(
            "this is one of %s tasks of a SLURM array, and the study is in SQLite, which serves "
            "those of one machine alone; tasks on several machines need database.url: "
            "postgresql+psycopg://user:password@host/name",
            tasks,
        )


def _crew_member(tree: Mapping[str, Any], out: Path, *, number: int, stop: Stop) -> None:
    """Worker `number` of `run`, after one that an earlier `run` left behind here has gone."""
    search = Search(build(SearchSettings, tree), out)
    name = f"{os.uname().nodename}-{number}"
    with ExitStack() as held:
        while not held.enter_context(claim(search.out / "claims" / name, wait=False)):
            if stop.value:
                return
            time.sleep(POLL_S / 4)
        _work(search, name, stop)


def _work(search: Search, name: str, stop: Stop) -> None:
    database = search.settings.database
    queue = search.join(name, stop)
    while not stop.value:
        with ExitStack() as held:
            taken = persist(lambda: queue.take(held), database, stop)
            if taken is not None:
                _train(queue, taken, search, stop)
                continue
        if persist(queue.finished, database, stop):
            return
        time.sleep(POLL_S)


def _train(queue: Queue, taken: Taken, search: Search, stop: Stop) -> None:
    """Train one trial and enter its result, or give it back."""
    trial, database, objective = taken.trial, search.settings.database, queue.objective
    pruner = _pruner(queue, taken, database, stop) if search.settings.prune else None

    def is_to_stop() -> bool:
        return stop.value or (pruner is not None and pruner.behind)

    try:
        with heartbeat(queue.storage, trial._trial_id), pruner or nullcontext():
            found = objective.train(
                taken.params, name=taken.name, replicate=taken.replicate, stop=is_to_stop
            )
    except CompletedPError:
        persist(lambda: queue.fail(taken), database, stop)
        raise
    curve = pruner.losses if pruner else {}
    if isinstance(found, Facts):
        persist(lambda: queue.complete(taken, found, curve), database, stop)
        logger.info("trial %d: %.4f", trial.number, objective.value(found))
    elif pruner and pruner.behind:
        persist(lambda: queue.prune(taken, found, curve), database, stop)
        pruner.tidy()
        logger.info("trial %d was pruned", trial.number)
    else:
        stop.value = True  # the signal may have come to one of the ranks alone
        persist(lambda: queue.give_back(taken, found), database)


def _pruner(queue: Queue, taken: Taken, database: DatabaseSettings, stop: Stop) -> Pruner:
    """For the trial's first run, against the trials that have ended by now."""
    runs = queue.objective.configs(taken.params, name=taken.name, replicate=taken.replicate)
    _, config = next(iter(runs))
    trials = persist(lambda: queue.study.get_trials(deepcopy=False), database, stop)
    return Pruner(Path(config.run_dir), steps=config.steps, trials=trials)
