"""Stored files as blocks of decompressed bytes, hashed as they pass.

Any fsspec URL or local path; gzip and zstandard by suffix, both with several members or frames.
A stream that ends early is an error, never a short read. Memory stays at a few blocks.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import zstandard
from fsspec.core import url_to_fs

from megatron_completedp.errors import DataError

#: Read at once where we choose: few calls, and a block's rows stay in the processor's cache.
BLOCK_BYTES = 1 << 18

#: Compressed bytes handed to zstandard at once. It returns all that they expand to: most often
#: about 32 KiB, and at most 256 MiB, for a stream of nothing but runs expands 32,768 times.
_ZSTD_CHUNK_BYTES = 1 << 13


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """What was read from one stored file."""

    url: str
    """Where it lies: a URL, or an absolute local path."""
    bytes: int
    """Size as stored, before decompression."""
    sha256: str
    """Of the bytes as stored, in hexadecimal."""


def open_filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of `url`, and the path of `url` in it (absolute if local).

    Raises DataError for a protocol that fsspec does not know or whose package is not installed.
    """
    try:
        fs, path = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise DataError(
            f"{url} cannot be opened: {error}. Correct the URL, or pip install the package that "
            "fsspec needs for its protocol (aiohttp and requests for http, s3fs for s3)."
        ) from error
    return fs, str(path)


class StoredFile:
    """A file opened for one pass from its start; counts and hashes what is read.

    Raises DataError when the file is missing, cannot be read, or is empty: an empty shard is a
    failed download more often than it is meant.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        fs, path = open_filesystem(url)
        try:
            self._stream = fs.open(path, "rb")
        except FileNotFoundError as error:
            raise DataError(f"{url} does not exist. Correct the path or fetch the file.") from error
        except Exception as error:  # each protocol raises errors of its own library
            raise _unreadable(url, 0, error) from error
        self._bytes = 0
        self._sha256 = hashlib.sha256()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stream.close()

    def read(self, size: int = BLOCK_BYTES) -> bytes:
        """At most `size` of the bytes that follow; none at the end."""
        try:
            block: bytes = self._stream.read(size)
        except Exception as error:  # each protocol raises errors of its own library
            raise _unreadable(self.url, self._bytes, error) from error
        if not block and not self._bytes:
            raise DataError(f"{self.url} is empty; it may be a failed download. Fetch it again.")
        self._bytes += len(block)
        self._sha256.update(block)
        return block

    def record(self) -> InputFile:
        """What has been read so far: the whole file once `read` has returned nothing."""
        return InputFile(url=self.url, bytes=self._bytes, sha256=self._sha256.hexdigest())


def read_blocks(stored: StoredFile) -> Iterator[bytes]:
    """The decompressed bytes of `stored`, in blocks of any size; by suffix, .gz, .zst or plain.

    Raises DataError for a compressed stream that is truncated or corrupt.
    """
    if stored.url.endswith(".gz"):
        return _gzip_blocks(stored)
    if stored.url.endswith(".zst"):
        return _zstd_blocks(stored)
    return iter(stored.read, b"")


def _gzip_blocks(stored: StoredFile) -> Iterator[bytes]:
    try:
        # GzipFile asks of its file no more than read().
        with gzip.GzipFile(fileobj=stored, mode="rb") as stream:  # type: ignore[call-overload]
            while block := stream.read(BLOCK_BYTES):
                yield block
    except EOFError as error:
        raise _damaged(stored, "is truncated") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise _damaged(stored, f"is corrupt ({error})") from error


def _zstd_blocks(stored: StoredFile) -> Iterator[bytes]:
    """Frame by frame through decompressobj: zstandard's stream_reader ends a cut frame silently."""
    decompressor = zstandard.ZstdDecompressor()
    frame = None  # the frame that has begun and not ended
    while chunk := stored.read(_ZSTD_CHUNK_BYTES):
        while chunk:
            frame = frame or decompressor.decompressobj()
            try:
                block = frame.decompress(chunk)
            except zstandard.ZstdError as error:
                raise _damaged(stored, f"is corrupt ({error})") from error
            chunk = frame.unused_data
            if frame.eof:
                frame = None
            if block:
                yield block
    if frame is not None:
        raise _damaged(stored, "is truncated")


def _damaged(stored: StoredFile, problem: str) -> DataError:
    return DataError(
        f"{stored.url}: the compressed stream {problem}, {stored.record().bytes} stored bytes in. "
        "Fetch the file again."
    )


def _unreadable(url: str, position: int, error: Exception) -> DataError:
    return DataError(
        f"{url} cannot be read at byte {position} ({type(error).__name__}: {error}). Check the "
        "file, its permissions and, for a URL, the connection."
    )
