"""results.jsonl: what a study measured, one JSON object a line, kept over crashes and restarts.

The first line says what the rows are measurements of; rows are only ever appended, and several
processes may append at once.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from megatron_completedp.data.atomic import sync_directory
from megatron_completedp.errors import ConfigError, DataError

#: Stands for a setting that only one of two identities has.
_ABSENT = "(not given)"

#: Differences that an error lists.
_SHOWN = 8


class Results:
    """The rows of one study in one file.

    `identity` is what decides what a row means: the base, the steps, the data. Leave out what only
    decides how many rows there are (seeds, sizes, values of a sweep) where a row names its own, and
    how fast they come (workers), so that a study can be extended in place.
    """

    def __init__(
        self, path: Path, identity: Mapping[str, Any], *, text: Mapping[str, str] | None = None
    ) -> None:
        """Open or start the file. Raises ConfigError when its rows are of another identity.

        `text` has the hashes of the token files, as far as they are here (`data.manifest
        .text_hashes`): the identity's paths say where text lies, not which one. What the file's
        header or `text` does not know is not compared, so that rows can be read without the text.
        """
        self.path = path
        self._text = dict(text or {})
        # As it reads back: a tuple is a list, a number as a key is text.
        self._identity: dict[str, Any] = json.loads(json.dumps(identity))
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._locked() as stream:
            lines = stream.read().splitlines()
            if lines:
                self._compare(_parse(path, 1, lines[0]))
            else:
                header = {"hash": _digest(self._identity), "identity": self._identity}
                stream.write(_line(header | ({"text": self._text} if self._text else {})))
        sync_directory(path.parent)

    def rows(self) -> list[dict[str, Any]]:
        """Every row so far, other processes' too, in the order they were appended.

        A last line without its end was torn by a crash and is no row. Raises DataError for any
        other line that is not JSON.
        """
        whole, _, _ = self.path.read_bytes().rpartition(b"\n")
        rows = whole.splitlines()[1:]
        return [_parse(self.path, number, line) for number, line in enumerate(rows, start=2)]

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one row; it is on the disk when this returns."""
        with self._locked() as stream:
            stream.write(_line(row))

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        """The file at its end, this process alone in it, a torn last line cut off.

        Whoever tore the line is gone: a living writer would hold the lock.
        """
        with self.path.open("a+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            stream.seek(0)
            stream.truncate(stream.read().rfind(b"\n") + 1)
            stream.seek(0)
            yield stream
            stream.flush()
            os.fsync(stream.fileno())

    def _compare(self, header: dict[str, Any]) -> None:
        if "identity" not in header:
            raise DataError(
                f"{self.path}: line 1 is no header of a results file; delete the file or give "
                "another --out."
            )
        found = list(differences(header["identity"], self._identity))
        if found := [*found, *text_differences(header.get("text", {}), self._text)]:
            raise ConfigError(
                f"{self.path} holds results of another config: {in_words(found)}. Give "
                "another --out, or delete the folder to measure again."
            )


def text_differences(saved: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    """Each token file that both know and that is another one now."""
    for prefix in saved.keys() & now.keys():
        if saved[prefix] != now[prefix]:
            yield f"text {prefix} was {saved[prefix][:12]}..., is now {now[prefix][:12]}..."


def differences(saved: object, now: object, path: str = "") -> Iterator[str]:
    """Each value that differs between two trees of plain data, as `path was ..., is now ...`."""
    # A section that one of them lacks differs in the values that the other has in it.
    old, new = ({} if side == _ABSENT else side for side in (saved, now))
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            below = f"{path}.{key}" if path else key
            yield from differences(old.get(key, _ABSENT), new.get(key, _ABSENT), below)
    elif saved != now:
        yield f"{path} was {saved}, is now {now}"


def in_words(found: Sequence[str]) -> str:
    """Differences in one line, the most general first, and no more of them than can be read."""
    shown = sorted(found, key=lambda each: each.split(" was ")[0].count("."))[:_SHOWN]
    more = len(found) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "")


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise DataError(
            f"{path}: line {number} is not a JSON object. Only the last line can be torn by a "
            "crash; restore the file or delete it to measure again."
        )
    return row


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row).encode() + b"\n"


def _digest(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
