"""One pass over one input shard: texts in batches, and an account of every row left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from megatron_completedp.data.layout import Format
from megatron_completedp.data.parquet import read_rows
from megatron_completedp.data.redpajama_v2 import Companions
from megatron_completedp.data.rows import BAD_ROWS, Unusual, parse_row, split_lines
from megatron_completedp.data.sources import SourceFile
from megatron_completedp.data.streams import InputFile, StoredFile, read_blocks
from megatron_completedp.errors import ConfigError, DataError

#: Source bytes behind one batch, about: enough to hide the cost of a call, little memory.
BATCH_BYTES = 4 << 20


class TextBatch(NamedTuple):
    """Documents to tokenize together."""

    texts: list[str]
    """Valid Unicode, none of them empty. No text at all where every row was left out."""
    bytes_read: int
    """Decompressed source bytes behind this batch, those of rows left out included."""


class ShardReader:
    """Iterate it once for the batches of `file`; its counts are complete when that has ended.

    Raises DataError, at once, for a file that cannot be read to its end, and, after the last
    batch, for one that has no row or more bad rows than `max_bad_fraction` of all allows. So
    nothing made from the batches is to be kept before the iteration has ended.
    """

    def __init__(self, file: SourceFile, *, max_bad_fraction: float = 0.01) -> None:
        if not 0 <= max_bad_fraction <= 1:
            raise ConfigError(f"max_bad_fraction is {max_bad_fraction}; expected 0 to 1.")
        self.file = file
        self.max_bad_fraction = max_bad_fraction
        self.skipped: Counter[str] = Counter()
        """Rows left out, by reason: BAD_ROWS, empty_text, duplicate, filtered:<signal>."""
        self.repaired_documents = 0
        """Documents in which lone surrogates were replaced by U+FFFD."""
        self.rows = 0
        """Rows read, those left out included; blank lines are no rows."""
        self.inputs: list[InputFile] = []
        """The stored files behind the batches, the documents first."""
        self._line = 0
        self._first_bad = ""
        self._companions: Companions | None = None

    def __iter__(self) -> Iterator[TextBatch]:
        texts: list[str] = []
        bytes_read = 0
        for row, size in self._rows():
            bytes_read += size
            if text := self._admit(row):
                texts.append(text)
            if bytes_read >= BATCH_BYTES:
                yield TextBatch(texts, bytes_read)
                texts, bytes_read = [], 0
        if bytes_read:
            yield TextBatch(texts, bytes_read)
        self._check()

    def _rows(self) -> Iterator[tuple[str | Unusual | None, int]]:
        """Every row, None for a blank line, with the source bytes behind it."""
        url, field = self.file.url, self.file.field
        if self.file.format is Format.PARQUET:
            yield from read_rows(url, field, self.inputs)
            return
        if self.file.filter is not None:
            self._companions = Companions(url, self.file.filter)
        with StoredFile(url) as stored:
            for line in split_lines(read_blocks(stored)):
                yield parse_row(line, field), len(line) + 1
            self.inputs.append(stored.record())
        if self._companions:
            self._companions.finish()
            self.inputs += self._companions.inputs

    def _admit(self, row: str | Unusual | None) -> str:
        """The text of `row`, counted; empty when it is left out."""
        self._line += 1
        if row is None:
            return ""
        self.rows += 1
        # Asked for bad rows too, to stay in step with the documents.
        verdict = self._companions.verdict() if self._companions else ""
        if isinstance(row, str) and not verdict:
            return row
        text, reason = row if isinstance(row, Unusual) else (row, "")
        reason = reason or verdict
        if not reason:
            self.repaired_documents += 1
            return text
        self.skipped[reason] += 1
        if reason in BAD_ROWS and not self._first_bad:
            self._first_bad = f"{self.file.url}:{self._line} ({reason}: {BAD_ROWS[reason]})"
        return ""

    def _check(self) -> None:
        if not self.rows:
            raise DataError(
                f"{self.file.url} has no row; it may be a failed download. Fetch it again."
            )
        bad = sum(self.skipped[reason] for reason in BAD_ROWS)
        if bad > self.max_bad_fraction * self.rows:
            raise DataError(
                f"{self.file.url}: {bad} of {self.rows} rows ({bad / self.rows:.2%}) cannot be "
                f"used, more than the {self.max_bad_fraction:.2%} that max_bad_fraction allows. "
                f"The first is {self._first_bad}. The field read is {self.file.field!r}. Correct "
                "the file or `field`, or raise max_bad_fraction."
            )


def read_texts(files: Iterable[SourceFile]) -> Iterator[str]:
    """The texts of `files`, in order; errors as of ShardReader."""
    for file in files:
        for batch in ShardReader(file):
            yield from batch.texts
