"""Write a pair of `data.indexed`: stream documents into .bin, then describe them in .idx."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_completedp.data.atomic import atomic_write
from megatron_completedp.data.indexed import (
    CODE_OF_DTYPE,
    HEADER,
    MAGIC,
    VERSION,
    bin_path,
    byte_offsets,
    idx_path,
    token_dtype,
)
from megatron_completedp.errors import DataError


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """What a file must be, byte for byte."""

    bytes: int
    """Its size."""
    sha256: str
    """Of its content, in hexadecimal."""


class _HashedStream:
    """Writes to a stream, and knows what a file of these bytes must be."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._bytes = 0
        self._sha256 = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        self._stream.write(data)
        self._sha256.update(data)
        self._bytes += memoryview(data).nbytes

    def record(self) -> FileRecord:
        """Of what was written so far."""
        return FileRecord(bytes=self._bytes, sha256=self._sha256.hexdigest())


class IndexedWriter:
    """Streams documents into an open .bin and remembers their lengths (4 bytes per document)."""

    def __init__(self, stream: BinaryIO, vocab_size: int) -> None:
        self._stream = _HashedStream(stream)
        self._vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)
        self.lengths = array("i")
        self.tokens = 0
        self.max_token_id = -1
        self.files: dict[str, FileRecord] = {}
        """Under "bin" and "idx", once the block of `open_indexed` has ended."""

    def add_documents(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents, each as one sequence.

        `ids` (shape [tokens], integers) are theirs back to back, `lengths` (shape [documents]) the
        tokens of each. Raises DataError when a document is empty or holds an id outside
        [0, vocab_size): numpy would wrap such an id silently into another token.
        """
        assert lengths.sum() == ids.size, "the lengths must cover the ids"
        if lengths.size == 0:
            return
        if lengths.min() < 1:
            number = len(self.lengths) + int(np.argmax(lengths < 1))
            raise DataError(f"document {number} has no token; leave empty documents out.")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self._vocab_size:
            position = int(np.argmax((ids < 0) | (ids >= self._vocab_size)))
            number = len(self.lengths) + int(np.searchsorted(lengths.cumsum(), position, "right"))
            raise DataError(
                f"document {number} holds the token id {ids[position]}; expected 0 to "
                f"{self._vocab_size - 1}. Pass the vocab_size of the tokenizer that made it."
            )
        self._stream.write(ids.astype(self.dtype).data)
        self.lengths.frombytes(lengths.astype("i").tobytes())
        self.tokens += ids.size
        self.max_token_id = max(self.max_token_id, high)

    def finish_bin(self) -> None:
        """Take the record of .bin, to which nothing is added any more."""
        self.files["bin"] = self._stream.record()

    def write_index(self, stream: BinaryIO) -> None:
        """Write the .idx that describes the documents added, and take its record."""
        lengths = np.frombuffer(self.lengths, dtype="i").astype("<i4")
        index = _HashedStream(stream)
        code = CODE_OF_DTYPE[self.dtype]
        index.write(HEADER.pack(MAGIC, VERSION, code, lengths.size, lengths.size + 1))
        index.write(lengths.data)
        index.write(byte_offsets(lengths, self.dtype.itemsize).data)
        index.write(np.arange(lengths.size + 1, dtype="<i8").data)
        self.files["idx"] = index.record()


@contextmanager
def open_indexed(prefix: Path, vocab_size: int) -> Iterator[IndexedWriter]:
    """A writer of the pair at `prefix`, which is complete when the block ends.

    .idx appears last, and only when both files are complete. A pair already at `prefix` loses its
    .idx before its .bin is replaced, so an old index never describes new data. Raises DataError
    when the block added no document.
    """
    with atomic_write(bin_path(prefix)) as stream:
        writer = IndexedWriter(stream, vocab_size)
        yield writer
        if not writer.lengths:
            raise DataError(f"no document for {prefix}; expected at least one. Check the inputs.")
        writer.finish_bin()
        idx_path(prefix).unlink(missing_ok=True)
    with atomic_write(idx_path(prefix)) as stream:
        writer.write_index(stream)
