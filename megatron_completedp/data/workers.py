"""Shards to worker processes, here and on other machines that share the output folder.

Each process takes the next shard that nobody has, claims it by a lock that dies with it, and makes
it. Nothing is written about who did what, so any number of processes on any number of machines may
run the same command at once, be killed and be started again. A process with nothing left to start
waits for the shards that others hold and takes over what they leave unfinished; when it ends
without an error, every shard is finished, whoever made it.

Why not datatrove's executors, which also scale from processes to SLURM: there a task is the unit of
work and of restart. Task r of n gets every n-th file and writes files named by r, so another number
of tasks makes other files; what is done is an empty marker per r, which says neither with which
settings nor whether the bytes are whole; and the tasks of one share cannot help with another's.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_any
from typing import NamedTuple, cast

from megatron_completedp.data.encoder import Encoder
from megatron_completedp.data.restart import Finished, ShardOrder, make_shard
from megatron_completedp.data.sources import SourceFile
from megatron_completedp.data.tokenizer import load_tokenizer
from megatron_completedp.errors import CompletedPError

#: For so long a worker may take to leave what it is at.
_STOP_S = 10.0


class Progress(NamedTuple):
    """What a worker did for its shard since it last said so."""

    documents: int
    bytes_read: int
    tokens: int


class Failed(NamedTuple):
    """A shard was not made."""

    reason: str
    for_all: bool
    """Nor would any other be, for the same reason."""


def run_workers(
    order: ShardOrder,
    files: Sequence[SourceFile],
    processes: int,
    *,
    on_progress: Callable[[SourceFile, Progress], None],
    on_finished: Callable[[SourceFile, Finished], None],
) -> dict[str, str]:
    """Make every shard of `files`, begun in that order, on `processes` worker processes.

    A bad file or a killed worker costs its own shard; a full disk costs all that are not begun.
    Returns the reason for each shard (by key) that is not finished; empty means that all are.
    """
    crew = _Crew(order, files, processes)
    try:
        while (event := crew.next_event()) is not None:
            file, news = event
            if isinstance(news, Progress):
                on_progress(file, news)
            elif isinstance(news, Finished):
                on_finished(file, news)
    finally:
        crew.stop()
    return crew.failures


class _Crew:
    """The workers, and the shards that are left to them."""

    def __init__(self, order: ShardOrder, files: Sequence[SourceFile], processes: int) -> None:
        self._order = order
        self._fresh = deque(files)
        #: Begun by another process when we came to them.
        self._held: deque[SourceFile] = deque()
        self._workers = [_Worker(order) for _ in range(min(processes, len(files)))]
        self.failures: dict[str, str] = {}

    def next_event(self) -> tuple[SourceFile, Progress | Finished | Failed] | None:
        """Wait for news of a shard; None when no shard is left."""
        while True:
            self._give_work()
            busy = {worker.connection: worker for worker in self._workers if worker.file}
            if not busy:
                return None
            ready = wait_for_any(list(busy))[0]
            worker = busy[cast(Connection, ready)]
            file, news = worker.file, worker.receive()
            assert file is not None, "only workers with a shard are waited for"
            if news is None:
                self._held.append(file)
                continue
            if isinstance(news, Failed):
                self.failures[file.key] = news.reason
                if news.for_all:
                    self._give_up()
            if worker.dead:
                self._workers[self._workers.index(worker)] = _Worker(self._order)
            return file, news

    def stop(self) -> None:
        """End all workers, in the middle of shards too."""
        for worker in self._workers:
            worker.stop()

    def _give_work(self) -> None:
        for worker in self._workers:
            if worker.file is None and self._fresh:
                worker.give(self._fresh.popleft(), wait=False)
            elif worker.file is None and self._held:
                worker.give(self._held.popleft(), wait=True)

    def _give_up(self) -> None:
        for file in (*self._fresh, *self._held):
            self.failures[file.key] = "not begun"
        self._fresh.clear()
        self._held.clear()


class _Worker:
    """A process, and the shard it is at."""

    def __init__(self, order: ShardOrder) -> None:
        # spawn: a forked child would also hold the other children's pipes, whose closing is how a
        # death is noticed, and locks of threads that it does not have.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.file: SourceFile | None = None
        self.dead = False
        self._process = context.Process(target=_work, args=(order, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def give(self, file: SourceFile, *, wait: bool) -> None:
        """Let it make `file`; with `wait`, after whoever holds it."""
        self.file = file
        with suppress(BrokenPipeError):  # it is dead, which `receive` will find
            self.connection.send((file, wait))

    def receive(self) -> Progress | Finished | Failed | None:
        """Its next message, None for a held shard; all but Progress leave it without one."""
        try:
            news: Progress | Finished | Failed | None = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.dead = True
            self._process.join()
            code = self._process.exitcode or 0
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended by exit {code}"
            news = Failed(f"the process that made it was {how}; is there memory enough?", False)
        if not isinstance(news, Progress):
            self.file = None
        return news

    def stop(self) -> None:
        """End it; its lock and its temporary files go with it."""
        self._process.terminate()
        self._process.join(_STOP_S)
        self._process.kill()  # if it hangs: its next start removes the temporary files
        self._process.join()
        self.connection.close()


def _work(order: ShardOrder, connection: Connection) -> None:
    """A worker process: make the shards that come through `connection` until it closes."""
    # Ctrl-C reaches every process of a terminal; what it means is for the parent to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # As an exception, so that temporary files are removed on the way out.
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    # Which engine is used, and why, has been said once for all workers.
    logging.getLogger("megatron_completedp.data.fast_engine").setLevel(logging.ERROR)
    encoder = Encoder(load_tokenizer(order.tokenizer), engine=order.engine)
    with suppress(EOFError, BrokenPipeError):  # the parent has gone, and its job with it
        while True:
            file, wait = connection.recv()
            connection.send(_make(order, file, encoder, connection, wait=wait))


def _make(
    order: ShardOrder, file: SourceFile, encoder: Encoder, connection: Connection, *, wait: bool
) -> Finished | Failed | None:
    try:
        return make_shard(
            order,
            file,
            encoder,
            wait=wait,
            on_progress=lambda *done: connection.send(Progress(*done)),
        )
    except BrokenPipeError:
        raise  # of our connection, not of a disk
    except CompletedPError as error:
        return Failed(str(error), for_all=False)
    except OSError as error:
        return Failed(
            f"{order.prefix(file)} cannot be written ({error}). Make room or correct the rights, "
            "then run the same command again.",
            for_all=True,
        )
