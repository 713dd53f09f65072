"""Signals ask a run to save and leave; a second one ends the process at once.

SIGTERM (batch systems, torchrun), SIGUSR1 (the warning SLURM can send ahead of the time limit) and
SIGINT (a person at the terminal) mean the same.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from types import FrameType, TracebackType

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

#: Signals this soon after the first are the same request: batch systems signal every process of a
#: job, and torchrun then hands its own signal on to the ranks.
REPEAT_S = 2.0


class StopSignals:
    """Inside `with`, the stop signals set `received` instead of ending this process.

    One that comes REPEAT_S or more after the first ends it at once with exit code 128 + its number,
    even from within a collective that never returns. Afterwards the first is handed on to the
    handler that a caller had set for it: the run that took it may have ended as if nothing were.
    Main thread only, as Python demands.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        """Name of the first signal; None while there was none."""

    def requested(self) -> bool:
        """Whether this process was asked to stop; other ranks may not have been."""
        return self.received is not None

    def __enter__(self) -> StopSignals:
        # Python runs handlers between bytecodes of the main thread, so not while that waits in C
        # for another rank. The wakeup descriptor is written at once, and another thread reads it.
        reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._old_descriptor = signal.set_wakeup_fd(self._writer.fileno())
        self._old_handlers = {number: signal.signal(number, _do_nothing) for number in SIGNALS}
        for number in SIGNALS:
            # Communication libraries may not expect their system calls to be interrupted.
            signal.siginterrupt(number, False)
        self._listener = threading.Thread(
            target=self._listen, args=(reader,), name="stop-signals", daemon=True
        )
        self._listener.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_descriptor)
        # The listener reads the end of the stream and ends. Closing alone would not do it: forked
        # processes hold the socket open.
        self._writer.shutdown(socket.SHUT_WR)
        self._writer.close()
        self._listener.join()
        if self.received is not None:
            number = signal.Signals[self.received]
            handler = self._old_handlers[number]
            # Python's own for Ctrl-C is nobody's wish: it would end what has just been finished.
            if callable(handler) and handler is not signal.default_int_handler:
                handler(number, None)

    def _listen(self, reader: socket.socket) -> None:
        first_at = 0.0
        with reader:
            while numbers := reader.recv(64):
                for number in numbers:
                    if number not in SIGNALS:
                        continue  # every handled signal of the process is written here
                    name = signal.Signals(number).name
                    if self.received is None:
                        self.received, first_at = name, time.monotonic()
                        logger.info("%s: saving after this step; once more exits at once", name)
                    elif time.monotonic() - first_at >= REPEAT_S:
                        os.write(2, f"{name} again: exiting without another checkpoint\n".encode())
                        os._exit(128 + number)


def ignore_in_worker(worker: int) -> None:
    """Keep data worker number `worker` alive through SIGTERM; a DataLoader's `worker_init_fn`.

    Batch systems signal every process of a job, the run still needs its batches, and torch's own
    handler, which the workers have by now, would end them.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """A signal without a Python handler would not be written to the wakeup descriptor."""


def _leave_signals_to_the_parent() -> None:
    """In a forked process: its signals must not count as the parent's.

    The handler that does nothing stays, so that a checkpoint's writer survives to the end.
    """
    if signal.getsignal(signal.SIGTERM) is _do_nothing:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_leave_signals_to_the_parent)
