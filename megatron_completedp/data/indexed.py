r"""Megatron's indexed dataset: a pair of files PREFIX.bin and PREFIX.idx.

.bin is the token ids of all sequences back to back. .idx, little-endian, describes them:

    9 bytes  magic "MMIDIDX\0\0"
    u64      version, 1
    u8       dtype code of the ids: 8 = uint16, 4 = int32
    u64      S, the number of sequences
    u64      D + 1, one more than the number of documents
    int32    length of each sequence, in tokens             (S values)
    int64    byte offset of each sequence in .bin           (S values)
    int64    first sequence of each document, and last S    (D + 1 values)

megatron-core maps both files into memory without comparing their sizes with these counts, so a
truncated file trains on garbage or fails far from its cause: call `check_pair` before training.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_completedp.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
#: .idx up to the lengths: magic, version, dtype code, S and D + 1.
HEADER = struct.Struct("<9sQBQQ")

#: The two codes that language-model tokens are stored in; Megatron knows others for other data.
DTYPE_OF_CODE: dict[int, np.dtype] = {8: np.dtype("<u2"), 4: np.dtype("<i4")}
CODE_OF_DTYPE = {dtype: code for code, dtype in DTYPE_OF_CODE.items()}


@dataclass(frozen=True, kw_only=True)
class IndexedSummary:
    """What a complete pair of files holds."""

    prefix: Path
    """The common part of the two paths, without .bin or .idx."""
    documents: int
    """Documents, each ending where the text's source ended."""
    sequences: int
    """Stored sequences; one per document in pairs that this package writes."""
    tokens: int
    """Token ids in all, end-of-document ids included."""
    dtype: str
    """uint16 or int32."""


def bin_path(prefix: Path) -> Path:
    """PREFIX.bin; the suffix is appended, so that a dot in the prefix is kept."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """PREFIX.idx; the suffix is appended, so that a dot in the prefix is kept."""
    return prefix.with_name(prefix.name + ".idx")


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 below 65,500 ids and int32 from there on: the choice of Megatron's own tool."""
    return DTYPE_OF_CODE[8 if vocab_size < 65_500 else 4]


def byte_offsets(lengths: np.ndarray, itemsize: int) -> np.ndarray:
    """Start of each sequence in .bin, in bytes (shape [sequences], int64)."""
    sizes = lengths.astype("<i8") * itemsize
    starts: np.ndarray = np.cumsum(sizes) - sizes
    return starts


def open_pair(prefix: Path) -> tuple[np.ndarray, np.ndarray]:
    """The ids of all documents (shape [tokens], mapped from .bin) and the length of each.

    Only the header is checked: `check_pair` tells whether the files are whole.
    """
    dtype, sequences, _ = _read_header(idx_path(prefix))
    lengths: np.ndarray = np.fromfile(
        idx_path(prefix), dtype="<i4", count=sequences, offset=HEADER.size
    )
    ids: np.ndarray = np.memmap(bin_path(prefix), dtype=dtype, mode="r")
    return ids, lengths


def check_pair(prefix: Path) -> IndexedSummary:
    """Verify that PREFIX.bin and PREFIX.idx exist, are complete and fit each other.

    Reads the whole .idx and the size of .bin; the ids themselves are not read, so a flipped bit in
    .bin passes. Raises DataError naming the file, the expected and the found size, and the fix.
    """
    data, index = bin_path(prefix), idx_path(prefix)
    for path in (data, index):
        if not path.is_file():
            raise DataError(f"{path} does not exist; {_REBUILD}, or correct the data prefix.")
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty; {_REBUILD}.")
    dtype, sequences, boundaries = _read_header(index)
    body = np.fromfile(index, dtype=np.uint8, offset=HEADER.size)
    at_offsets, at_documents = 4 * sequences, 12 * sequences
    lengths = body[:at_offsets].view("<i4")
    # The body's slices need not start on a multiple of 8 bytes; a copy does.
    offsets = body[at_offsets:at_documents].copy().view("<i8")
    documents = body[at_documents:].copy().view("<i8")
    _check_index(index, dtype, lengths, offsets, documents)
    tokens = int(lengths.sum(dtype=np.int64))
    expected, found = tokens * dtype.itemsize, data.stat().st_size
    if found != expected:
        raise DataError(
            f"{data} has {found:,} bytes; its index counts {tokens:,} {dtype.name} tokens, "
            f"{expected:,} bytes. It is truncated or belongs to another .idx; {_REBUILD}."
        )
    return IndexedSummary(
        prefix=prefix,
        documents=boundaries - 1,
        sequences=sequences,
        tokens=tokens,
        dtype=dtype.name,
    )


_REBUILD = "make the pair again with tools/preprocess_redpajama.py, or copy it again"


def _read_header(index: Path) -> tuple[np.dtype, int, int]:
    """(token dtype, sequences, documents + 1), after comparing the counts with the file's size."""
    found = index.stat().st_size
    with index.open("rb") as stream:
        header = stream.read(HEADER.size)
    if not header.startswith(MAGIC):
        raise DataError(
            f"{index} starts with {header[:9]!r}; expected {MAGIC!r}. It is not a Megatron index "
            f"or its start was overwritten; {_REBUILD}."
        )
    if len(header) < HEADER.size:
        raise DataError(
            f"{index} has {found} bytes; its header alone needs {HEADER.size}. {_REBUILD}."
        )
    _, version, code, sequences, boundaries = HEADER.unpack(header)
    if version != VERSION:
        raise DataError(f"{index} has version {version}; expected {VERSION}. {_REBUILD}.")
    if code not in DTYPE_OF_CODE:
        raise DataError(
            f"{index} has dtype code {code}; expected 8 (uint16) or 4 (int32). {_REBUILD}."
        )
    expected = HEADER.size + 12 * sequences + 8 * boundaries
    if found != expected:
        raise DataError(
            f"{index} has {found:,} bytes; its header counts {sequences:,} sequences and "
            f"{boundaries - 1:,} documents, {expected:,} bytes. It is "
            f"{'truncated' if found < expected else 'followed by bytes it should not have'}; "
            f"{_REBUILD}."
        )
    return DTYPE_OF_CODE[code], sequences, boundaries


def _check_index(
    index: Path,
    dtype: np.dtype,
    lengths: np.ndarray,
    offsets: np.ndarray,
    documents: np.ndarray,
) -> None:
    """Raise DataError when the three arrays of an index contradict each other."""
    if lengths.size == 0:
        raise DataError(f"{index} counts no sequence; expected at least one. {_REBUILD}.")
    garbled = None
    if int(lengths.min()) < 0:
        garbled = f"a sequence of {int(lengths.min())} tokens"
    elif not np.array_equal(offsets, byte_offsets(lengths, dtype.itemsize)):
        garbled = "byte offsets that are not the running sum of the sequence lengths"
    elif documents.size == 0 or documents[0] != 0 or documents[-1] != lengths.size:
        garbled = f"document boundaries that do not run from 0 to {lengths.size}"
    elif np.any(np.diff(documents) < 0):
        garbled = "document boundaries that go backwards"
    if garbled:
        raise DataError(f"{index} is garbled: it lists {garbled}. {_REBUILD}.")
