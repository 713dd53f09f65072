"""Who works on what, among processes and machines that share a folder.

A claim is an advisory lock (flock) on a file. The operating system drops it when its process ends,
however it ends, so nothing is left to clean up before another process can take over.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from megatron_completedp.errors import DataError


@contextmanager
def claim(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the lock file `path` while the block runs; yields whether it was to be had.

    With `wait` it blocks until the present holder releases it or dies, and always yields True. The
    file exists only while it is held (or after its holder was killed). Raises DataError where the
    file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("ab") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
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
