"""A rank that hangs ends the job: stacks of all its threads, then a non-zero exit."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

#: From the stacks to the exit. The end of one rank breaks the others' collectives; this lets them
#: write their own stacks first, which show who was waiting for whom.
GRACE_S = 5.0

EXIT_CODE = 1


class Watchdog:
    """Inside `with`, ends the process when `beat` was not called for `timeout_s` seconds.

    The stacks of all threads go to stderr and to `folder/stacks_rank<rank>.txt`.
    """

    def __init__(self, timeout_s: float, *, folder: Path, rank: int) -> None:
        self._timeout_s = timeout_s
        self._path = folder / f"stacks_rank{rank}.txt"
        self._rank = rank
        self._ended = threading.Event()
        self.beat("the start")

    def beat(self, done: str) -> None:
        """Say that `done`, such as "step 7", has finished; the time counts from now."""
        self._last, self._done = time.monotonic(), done

    def __enter__(self) -> Watchdog:
        self._watcher = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._watcher.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._watcher.join()

    def _watch(self) -> None:
        while (remaining := self._last + self._timeout_s - time.monotonic()) > 0:
            if self._ended.wait(remaining):
                return
        self._end_process()

    def _end_process(self) -> None:
        message = (
            f"error: rank {self._rank} has finished nothing since {self._done}, for "
            f"{self._timeout_s:g} s (training.timeout_s). The stacks below, also in {self._path}, "
            "show where it waits. Mend that, or raise the timeout if a step takes this long.\n"
        )
        # By descriptor, so that no lock of a stuck thread is needed.
        os.write(2, message.encode())
        faulthandler.dump_traceback(sys.__stderr__ or 2)
        # A full disk or a folder that was not made yet must not keep the job alive.
        with suppress(OSError), self._path.open("w", encoding="utf-8") as file:
            file.write(message)
            file.flush()
            faulthandler.dump_traceback(file)
        time.sleep(GRACE_S)
        os._exit(EXIT_CODE)
