"""The folder of a run's checkpoints: which exist, which is newest, which may go.

A checkpoint is a folder `step_<n>`. It is made under a temporary name and renamed when complete, so
the listing is the truth; the file `latest` only says the same to people and scripts. Needs neither
torch nor Megatron. One process at a time, rank 0, changes the folder.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

from megatron_completedp.data.atomic import atomic_write, sync_directory

POINTER_FILE = "latest"
_NAME = re.compile(r"step_(\d{8,})")
_TEMPORARY = ".writing_"

logger = logging.getLogger(__name__)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` finished steps is, or would be."""
    return folder / f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The finished steps in a checkpoint's name."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None, f"{checkpoint} does not come from list_checkpoints"
    return int(match[1])


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=step_of)


def start_writing(folder: Path) -> Path:
    """A new temporary folder in `folder`, whose leftovers are removed. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    temporary = _temporary_name(folder)
    temporary.mkdir()
    return temporary


def remove_leftovers(folder: Path) -> None:
    """Remove what interrupted saves left in `folder`; what cannot be removed is logged."""
    for leftover in folder.glob(f"{_TEMPORARY}*"):
        discard(leftover)


def discard(path: Path) -> None:
    """Remove a folder that is no checkpoint; nothing depends on it, so failing is only logged."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        logger.warning("%s cannot be removed: %s", path, error)


def publish(temporary: Path, target: Path) -> None:
    """Give a complete checkpoint its name; its files are on the disk already. Raises OSError.

    A checkpoint of the same step, which a run left that resumed from an older one, is replaced.
    """
    sync_directory(temporary)
    replaced = _set_aside(target) if target.exists() else None
    os.rename(temporary, target)
    sync_directory(target.parent)
    if replaced is not None:
        discard(replaced)


def obsolete(steps: Sequence[int], *, newest: int, keep_last: int, keep_every: int) -> list[int]:
    """Which of `steps` may be deleted after a save at step `newest`.

    Kept are the `keep_last` newest up to `newest`, multiples of `keep_every` (0: none), and what is
    beyond `newest`: a resumed run did not trust it, and writes it again when it gets there.
    """
    reached = sorted(step for step in steps if step <= newest)
    return [step for step in reached[:-keep_last] if not (keep_every and step % keep_every == 0)]


def tidy(checkpoint: Path, *, keep_last: int, keep_every: int) -> None:
    """Point `latest` to a checkpoint just published and delete the `obsolete` ones.

    The checkpoint is complete whatever happens here, so a failure is only logged.
    """
    folder = checkpoint.parent
    try:
        with atomic_write(folder / POINTER_FILE) as stream:
            stream.write(f"{checkpoint.name}\n".encode())
        steps = [step_of(path) for path in list_checkpoints(folder)]
        newest = step_of(checkpoint)
        for step in obsolete(steps, newest=newest, keep_last=keep_last, keep_every=keep_every):
            discard(_set_aside(checkpoint_path(folder, step)))
    except OSError as error:
        logger.warning("%s is complete, but %s was not tidied: %s", checkpoint, folder, error)


def pointer_problem(folder: Path) -> str | None:
    """What is wrong with `latest`, for the log; None when it names a checkpoint or is not there."""
    pointer = folder / POINTER_FILE
    try:
        name = pointer.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        return f"{pointer} cannot be read ({error}); the folder's listing is used."
    if not name:
        return f"{pointer} is empty; the folder's listing is used."
    if name not in [path.name for path in list_checkpoints(folder)]:
        return f"{pointer} names {name!r}, which is not there; the folder's listing is used."
    return None


def _set_aside(checkpoint: Path) -> Path:
    """Take a checkpoint's name away; half a deletion must not look like a checkpoint."""
    aside = _temporary_name(checkpoint.parent)
    os.rename(checkpoint, aside)
    return aside


def _temporary_name(folder: Path) -> Path:
    # New every time: a writer that outlived a killed run may still hold the name it was given.
    return folder / f"{_TEMPORARY}{uuid.uuid4().hex[:12]}"
