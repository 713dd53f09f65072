"""What a preprocessing job shows: a progress bar, and a table of what came out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from tqdm import tqdm

from megatron_completedp.core.render import text_table
from megatron_completedp.data.manifest import ShardManifest


def expected_bytes(url: str, stored_bytes: int) -> int:
    """A guess at the decompressed size of a file from its stored size: prose shrinks to a third."""
    return stored_bytes * (3 if url.endswith((".zst", ".gz", ".parquet")) else 1)


class ProgressBar:
    """A bar on a terminal over the bytes of text files, with documents/s, MB/s and tokens/s.

    Bytes count as decompressed. What a compressed file expands to is a guess until it is finished,
    so the end of the bar moves a little.
    """

    def __init__(self, expected: Mapping[str, int]) -> None:
        """`expected`: decompressed bytes of each shard as far as they can be guessed, by key."""
        self._expected = dict(expected)
        self._read: Counter[str] = Counter()
        self._documents = self._tokens = self._finished = 0
        self._start = time.monotonic()
        # disable=None: a bar on a terminal, nothing in a log file.
        self._bar = tqdm(
            total=sum(self._expected.values()), unit="B", unit_scale=True, disable=None
        )

    def advance(self, key: str, documents: int, bytes_read: int, tokens: int) -> None:
        """Add what was done for the shard `key` since the last call."""
        self._read[key] += bytes_read
        self._documents += documents
        self._tokens += tokens
        self._bar.set_postfix_str(self._rates(), refresh=False)
        self._bar.update(bytes_read)

    def finish(self, key: str) -> None:
        """Say that the shard `key` is complete, whoever made it: its size is a guess no more."""
        self._finished += 1
        self._bar.total += self._read[key] - self._expected[key]
        self._bar.set_postfix_str(self._rates())

    def close(self) -> str:
        """Leave the bar as it is; returns what was done here, for the log."""
        self._bar.close()
        size, elapsed = sum(self._read.values()) / 1e6, time.monotonic() - self._start
        return f"{size:,.1f} MB read in {elapsed:.1f} s: {size / elapsed:.1f} MB/s, {self._rates()}"

    def _rates(self) -> str:
        elapsed = time.monotonic() - self._start
        return (
            f"{self._documents / elapsed:,.0f} documents/s, {self._tokens / elapsed / 1e6:.2f} M "
            f"tokens/s, {self._finished} of {len(self._expected)} shards"
        )


def summary_table(shards: Iterable[tuple[str, ShardManifest]]) -> str:
    """A row per subset and one for all of them, from (subset, manifest) of each shard."""
    by_subset: dict[str, list[ShardManifest]] = {}
    for subset, manifest in shards:
        by_subset.setdefault(subset, []).append(manifest)
    rows = [_row(subset, manifests) for subset, manifests in sorted(by_subset.items())]
    if len(rows) > 1:
        rows.append(_row("total", [item for items in by_subset.values() for item in items]))
    header = ("subset", "shards", "documents", "text MB", "tokens", "tokens/byte", "engine")
    return text_table((*header, "rows left out"), rows, left=None)


def _row(name: str, manifests: Sequence[ShardManifest]) -> tuple[str, ...]:
    skipped = sum((Counter(item.skipped) for item in manifests), Counter[str]())
    tokens = sum(item.tokens for item in manifests)
    text_bytes = sum(item.text_bytes for item in manifests)
    return (
        name,
        f"{len(manifests):,}",
        f"{sum(item.documents for item in manifests):,}",
        f"{text_bytes / 1e6:,.1f}",
        f"{tokens:,}",
        f"{tokens / text_bytes:.3f}",
        ", ".join(sorted({item.engine for item in manifests})),
        ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items())) or "none",
    )
