"""Who works on what, among processes and machines that share a folder.

A claim is an advisory lock (flock) on a file. The operating system drops it when its process ends,
however it ends, so nothing is left to clean up before another process can take over.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from megatron_completedp.errors import DataError

#: Between two looks at a lock that another process holds.
_FIRST_PAUSE_S = 0.02
_LONGEST_PAUSE_S = 0.5


@contextmanager
def claim(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the lock file `path` while the block runs; yields whether it was to be had.

    With `wait` it asks until the present holder has released it or died, and always yields True.
    The file exists only while it is held (or after its holder was killed). Raises DataError where
    the file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    pause = _FIRST_PAUSE_S
    while True:
        with path.open("ab") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    yield False
                    return
                # A flock that waits would not return for a signal that came just before it.
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
                continue
            except OSError as error:
                raise DataError(
                    f"{path} cannot be locked ({error}); processes share the output folder by "
                    "locks. Mount the file system with them (Lustre: -o flock), or use another."
                ) from error
            # Its last holder may have removed it between our open and our lock; a lock on a file
            # that has no name any more keeps nobody out.
            if not _is_named(stream, path):
                continue
            try:
                yield True
            finally:
                path.unlink(missing_ok=True)
            return


def _is_named(stream: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False
