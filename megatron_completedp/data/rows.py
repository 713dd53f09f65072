"""Lines and rows of JSONL, and the rules by which a row is left out.

A row that is not what it should be is skipped and counted by reason, never repaired by guessing:
one bad line in a billion must not end a job, and a file of them must (see readers.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import orjson

#: A longer row is a defect, such as a file that has lost its newlines; it bounds the memory that
#: one row takes. The longest real documents, books and logs, are near 10 MB.
MAX_ROW_BYTES = 64 << 20

#: What is wrong with a row, by the name it is counted under. `empty_text` is not among them: a
#: row without text is no defect, it has nothing to give.
BAD_ROWS = {
    "torn_json": "the line is not JSON",
    "not_an_object": "the line is JSON but not an object",
    "no_text": "the row has no such field",
    "text_not_string": "the field is not a string",
    "invalid_utf8": "the bytes are not UTF-8",
    "row_too_long": f"the line is longer than {MAX_ROW_BYTES >> 20} MiB",
}

#: JSON may escape half of a surrogate pair alone, which no UTF-8 can hold.
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Unusual(NamedTuple):
    """A row that is left out, or whose text was repaired."""

    text: str
    """Valid Unicode; empty if the row is left out."""
    skipped: str = ""
    """Why the row is left out: `empty_text` or a key of BAD_ROWS; empty if it is not."""


def split_lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The lines in `blocks`, without the newline; a last line may do without one.

    A byte order mark at the start is dropped. A line above MAX_ROW_BYTES is cut somewhere above
    it: enough for `parse_row` to tell, and no more is held.
    """
    mark = _BYTE_ORDER_MARK  # before the first line; nothing before the others
    held: list[bytes] = []  # the parts of a line whose end has not come
    size = 0
    for block in blocks:
        start = 0
        while (end := block.find(b"\n", start)) >= 0:
            line = block[start:end]
            if held:
                line = b"".join([*held, line])
                held, size = [], 0
            yield line.removeprefix(mark)
            start, mark = end + 1, b""
        if start < len(block) and size <= MAX_ROW_BYTES:
            held.append(block[start:])
            size += len(held[-1])
    if last := b"".join(held).removeprefix(mark):
        yield last


def parse_row(line: bytes, field: str) -> str | Unusual | None:
    """The text under `field` of the JSON object in `line`; None for a blank line.

    The text of a row that is as it should be is returned as it stands, for that is nearly all of
    them. Other keys, their order and their types do not matter. What orjson refuses is read again
    by the standard library, which also takes lone surrogates, NaN and Infinity.
    """
    if len(line) > MAX_ROW_BYTES:
        return Unusual("", "row_too_long")
    try:
        return _text_of(orjson.loads(line), field)
    except orjson.JSONDecodeError:
        return _parse_refused(line, field)


def check_text(value: object) -> str | Unusual:
    """`value` if it is text, which is not looked into; else why it is left out."""
    if not isinstance(value, str):
        return Unusual("", "text_not_string")
    return value or Unusual("", "empty_text")


def _text_of(row: Any, field: str) -> str | Unusual:
    if type(row) is not dict:
        return Unusual("", "not_an_object")
    if field not in row:
        return Unusual("", "no_text")
    return check_text(row[field])


def _parse_refused(line: bytes, field: str) -> str | Unusual | None:
    """`parse_row` for what orjson refuses, which is rare: here the reason is found."""
    if not line.strip():
        return None
    try:
        decoded, valid = line.decode(), True
    except UnicodeDecodeError:
        decoded, valid = line.decode(errors="replace"), False
    try:
        value = json.loads(decoded)
    except (ValueError, RecursionError):  # not JSON; a number or a nesting beyond all limits
        return Unusual("", "torn_json")
    if not valid:
        return Unusual("", "invalid_utf8")
    row = _text_of(value, field)
    if isinstance(row, str) and _LONE_SURROGATE.search(row):
        return Unusual(_LONE_SURROGATE.sub("\ufffd", row))
    return row
