"""A folder that appears at its name when everything in it is written, and not before."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_completedp.data.atomic import sync_directory
from megatron_completedp.errors import ConversionError


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target`, which takes its name when the block ends without an exception.

    After an exception it is removed; a killed process leaves it under a name that says what it is
    (`<target>.unfinished-...`). Raises ConversionError when `target` exists and is not empty, and
    when the files cannot be written.
    """
    target = Path(os.path.abspath(target))  # "." has no name of its own
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConversionError(
            f"{target} exists and is not an empty folder; nothing is overwritten. Choose another "
            "name, or remove it."
        )
    temporary = target.with_name(f"{target.name}.unfinished-{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        # The folder follows the umask; safetensors makes files that only their owner can read.
        shared = temporary.stat().st_mode & 0o066
        for path in [path for path in temporary.rglob("*") if path.is_file()]:
            path.chmod(path.stat().st_mode | shared)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        sync_directory(temporary)
        temporary.replace(target)
        sync_directory(target.parent)
    except OSError as error:
        raise ConversionError(
            f"{target} could not be written ({error}); make room there, or choose another name."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
