"""Rows written as JSONL."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_completedp.data.atomic import atomic_write


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, ASCII-escaped, in the order given; atomic."""
    with atomic_write(path) as stream:
        for row in rows:
            stream.write(json.dumps(row).encode() + b"\n")
