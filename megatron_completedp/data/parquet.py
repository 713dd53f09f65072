"""Columns of Parquet files, in bounded pieces; needs the optional package pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

from megatron_completedp.data.rows import Unusual, check_text
from megatron_completedp.data.streams import InputFile, StoredFile, open_filesystem
from megatron_completedp.errors import DataError

#: Text decoded at once, about: a batch has as many rows as are this long on average.
_BATCH_BYTES = 1 << 20


def read_rows(url: str, field: str, inputs: list[InputFile]) -> Iterator[tuple[str | Unusual, int]]:
    """The rows of the string column `field`, each with its bytes of text.

    Adds the file to `inputs` first. Raises DataError when the file cannot be read, is no Parquet
    file or has no such column of strings.
    """
    for column in _read_column(url, field, inputs):
        size = column.nbytes // len(column)
        for value in column:
            yield _row_of(value), size


def read_strings(url: str, column: str, inputs: list[InputFile]) -> Iterator[str]:
    """The values of the string column `column`, none of them null; else as `read_rows`."""
    for values in _read_column(url, column, inputs):
        yield from values.to_pylist()


def _row_of(value: Any) -> str | Unusual:
    try:
        return check_text(value.as_py())
    except UnicodeDecodeError:  # the format asks for UTF-8 and pyarrow does not check it
        return Unusual("", "invalid_utf8")


def _read_column(url: str, name: str, inputs: list[InputFile]) -> Iterator[Any]:
    """The arrow arrays of the column `name`, which must hold strings, in order."""
    pyarrow = _import_pyarrow(url)
    inputs.append(_hash_file(url))
    fs, path = open_filesystem(url)
    with fs.open(path, "rb") as stream:
        try:
            # A buffer, so that a column chunk, which can be a whole file, is not read at once.
            file = pyarrow.parquet.ParquetFile(stream, buffer_size=_BATCH_BYTES)
            _check_column(url, file.schema_arrow, name)
            size = _rows_per_batch(file.metadata, name)
            for batch in file.iter_batches(batch_size=size, columns=[name]):
                yield batch.column(0)
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(
                f"{url} is not a whole Parquet file ({error}). Fetch the file again."
            ) from error


def _hash_file(url: str) -> InputFile:
    """Size and SHA-256 of the stored file, by a pass of its own: Parquet is not read in order."""
    with StoredFile(url) as stored:
        while stored.read():
            pass
        return stored.record()


def _check_column(url: str, schema: Any, name: str) -> None:
    found = str(schema.field(name).type) if name in schema.names else None
    if found not in ("string", "large_string"):
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise DataError(
            f"{url} has no string column {name!r}; it has {columns}. Set `field` to the one that "
            "holds the text."
        )


def _rows_per_batch(metadata: Any, name: str) -> int:
    """Rows that hold _BATCH_BYTES in the row group whose rows are the longest."""
    longest = 1.0
    for group in (metadata.row_group(i) for i in range(metadata.num_row_groups)):
        for chunk in (group.column(i) for i in range(group.num_columns)):
            if chunk.path_in_schema == name and group.num_rows:
                longest = max(longest, chunk.total_uncompressed_size / group.num_rows)
    return max(1, int(_BATCH_BYTES / longest))


def _import_pyarrow(url: str) -> ModuleType:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"{url} is read by the package pyarrow, which is not installed: pip install pyarrow."
        ) from error
    return pyarrow
