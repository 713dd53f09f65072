"""JSONL rows, read strictly: a bad row is an error with a file and a line, never a skipped row."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_completedp.data.atomic import atomic_write
from megatron_completedp.errors import DataError


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, ASCII-escaped, in the order given; atomic."""
    with atomic_write(path) as stream:
        for row in rows:
            stream.write(json.dumps(row).encode() + b"\n")


def read_texts(path: Path) -> Iterator[str]:
    """The `text` of each row of `path`, in order; other keys, and their order, do not matter.

    Raises DataError with file and line for a torn line, a row without text and a text that is not
    a string or not valid Unicode, and when the file is missing or has no row.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist; expected a JSONL file. Correct the path.")
    number = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            yield _text_of(line, f"{path}:{number}")
    if number == 0:
        raise DataError(f"{path} has no row; it may be a failed download. Fetch it again.")


def _text_of(line: bytes, place: str) -> str:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(
            f"{place}: not a JSON object ({error}); the file may be truncated. Fetch it again."
        ) from error
    if not isinstance(row, dict) or "text" not in row:
        found = f"keys {sorted(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
        raise DataError(f'{place}: {found}; expected an object with the key "text".')
    text = row["text"]
    if not isinstance(text, str):
        raise DataError(f'{place}: "text" is a {type(text).__name__}; expected a string.')
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f'{place}: "text" is not valid Unicode ({error}); repair or remove the row.'
            ) from error
    return text
