"""Input shards for the tests of sources and readers, stored as RedPajama stores them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import zstandard

from megatron_completedp.data.readers import ShardReader
from megatron_completedp.data.sources import Source, find_files


def rows(*texts: str) -> bytes:
    """One JSONL row per text."""
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def pack(name: str, content: bytes) -> bytes:
    """`content` compressed as the suffix of `name` says."""
    if name.endswith(".gz"):
        return gzip.compress(content)
    return zstandard.compress(content) if name.endswith(".zst") else content


def store(path: Path, content: bytes) -> Path:
    """`content` in the file `path`, compressed by its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pack(path.name, content))
    return path


def reader_of(path: Path | str, *, max_bad_fraction: float = 1.0, **source: Any) -> ShardReader:
    """A reader of the one shard at `path`; unlike the default it forgives any number of rows."""
    [file] = find_files([Source(path=str(path), **source)])
    return ShardReader(file, max_bad_fraction=max_bad_fraction)


def texts_of(batches: Iterable[Any]) -> list[str]:
    """All texts, in order."""
    return [text for batch in batches for text in batch.texts]
