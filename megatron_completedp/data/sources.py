"""From what the user names (folders, files, globs, URLs) to the list of input shards.

Each shard becomes one output pair. Its key, the output's path without suffix, follows from the
names alone, so that a list made again, by another worker or after a restart, is the same.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_completedp.data.layout import JSONL_SUFFIXES, PARQUET_SUFFIX, Format, Told, stem, tell
from megatron_completedp.data.redpajama_v2 import V2Filter, is_tail
from megatron_completedp.data.streams import open_filesystem
from megatron_completedp.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

_SUBSET = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_GLOB = re.compile(r"[*?\[]")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Documents to tokenize, as the user names them."""

    path: str
    """A folder, a file, a glob, or an fsspec URL of one."""
    format: Format | None = None
    """How the documents are stored; null tells it from each file's place and name."""
    subset: str | None = None
    """What the mixture calls them; null is RedPajama's name, or the file's or folder's own."""
    field: str | None = None
    """Key or column of the text; null is text, and raw_content for RedPajama-V2."""
    filter: V2Filter = dataclasses.field(default_factory=V2Filter)
    """Which documents of RedPajama-V2 to keep; other formats are not filtered."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("a source has an empty path; give a folder, a file, a glob or a URL.")
        if self.subset is not None and not _SUBSET.fullmatch(self.subset):
            raise ConfigError(
                f"subset {self.subset!r} of {self.path} names a folder of the output; expected "
                "letters, digits, '.', '_' and '-'."
            )


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One input shard; it becomes one output pair."""

    url: str
    """A URL, or an absolute local path."""
    format: Format
    """How its rows are stored; 1T and jsonl are read alike."""
    subset: str
    """Whose share of the mixture it counts to."""
    key: str
    """Where the pair goes below the output folder, without suffix; begins with the subset."""
    field: str
    """Key or column of the text."""
    filter: V2Filter | None
    """For RedPajama-V2, which documents to keep."""


class _Found(NamedTuple):
    """A file, before it is known whether it is a shard."""

    url: str
    relative: str  # its path below the folder that was named or that holds what was named
    owner: str  # the name of that folder, or of the file if it was itself named


def find_files(sources: Sequence[Source]) -> list[SourceFile]:
    """The shards behind `sources`, in their order and by key within each.

    Folders are searched to any depth, through links too; names that begin with a dot and files
    that are no JSONL or Parquet are passed over. Raises DataError when a source has no shard, when
    a file does not suit the source's format, and when two shards would have one key.
    """
    if not sources:
        raise DataError("no source is given; expected at least one folder, file, glob or URL.")
    files: dict[str, SourceFile] = {}
    for source in sources:
        for file in sorted(_shards(source), key=lambda file: file.key):
            if file.key in files:
                raise DataError(
                    f"{files[file.key].url} and {file.url} would both be written to {file.key}. "
                    "Remove one, or give one source another `subset`."
                )
            files[file.key] = file
    return list(files.values())


def _shards(source: Source) -> list[SourceFile]:
    try:
        found = list(_search(source.path))
    except DataError:
        raise
    except Exception as error:  # each protocol raises errors of its own library
        raise DataError(
            f"{source.path} cannot be listed ({type(error).__name__}: {error}). Check the path, "
            "its permissions and, for a URL, the connection."
        ) from error
    shards = [shard for item in found if (shard := _shard(source, item))]
    left_out = []
    if not source.filter.allow_unrated:
        left_out = [shard for shard in shards if shard.filter and is_tail(shard.key)]
    if left_out:
        logger.warning(
            "%s: %d tail shards are left out, for they have no quality signals; "
            "filter.allow_unrated reads them.",
            source.path,
            len(left_out),
        )
    kept = [shard for shard in shards if shard not in left_out]
    if not kept:
        raise DataError(
            f"{source.path} has no input shard among {len(found)} files ({len(left_out)} left out "
            f"as tail); expected names ending in {', '.join(JSONL_SUFFIXES)} or "
            f"{PARQUET_SUFFIX}, or `*` in the path for a glob. Correct the path or `format`."
        )
    return kept


def _search(path: str) -> Iterator[_Found]:
    """The files behind `path`; none if there is nothing."""
    fs, inside = open_filesystem(path)
    # Where folders are told by a slash, as over http, a folder answers like a file.
    if not inside.endswith("/") and fs.isfile(inside):
        name = inside.rpartition("/")[2]
        yield _Found(_url(fs, inside), name, stem(name) or name)
        return
    is_folder = fs.isdir(inside)
    pattern = _GLOB.search(inside)
    if not is_folder and pattern is None:
        raise DataError(
            f"{path} does not exist or cannot be reached. Correct the path or check the connection."
        )
    if is_folder:
        base, names = inside.rstrip("/"), _files_below(fs, inside)
    else:
        base = inside[: pattern.start()].rpartition("/")[0] if pattern else inside
        names = [name for name in fs.glob(inside) if fs.isfile(name)]
    for name in names:
        relative = name.removeprefix(base + "/")
        if not any(part.startswith(".") for part in relative.split("/")):
            yield _Found(_url(fs, name), relative, base.rpartition("/")[2])


def _files_below(fs: Any, folder: str) -> list[str]:
    if "file" not in fs.protocol:
        return list(fs.find(folder))
    # fsspec lists a linked folder as a file, and large corpora are often links to other disks.
    walk = os.walk(folder, followlinks=True)
    return [f"{parent}/{name}" for parent, _, names in walk for name in names]


def _url(fs: Any, path: str) -> str:
    return path if "file" in fs.protocol else str(fs.unstrip_protocol(path))


def _shard(source: Source, found: _Found) -> SourceFile | None:
    """The shard that `found` is; None if it is something else that may lie in such a folder."""
    told = tell(found.url)
    if told is None:
        return None
    if source.format in (Format.JSONL, Format.PARQUET):
        # The rows are these whatever layout the names are like; only the suffix has to agree.
        if (source.format is Format.PARQUET) != (told.format is Format.PARQUET):
            return None
        told = Told(source.format, "", "")
    if source.format not in (None, told.format):
        raise DataError(
            f"{found.url} is not in the layout of {source.format}; expected its published folders "
            f"and names. Move it away, or name it in a source with `format: {told.format}`."
        )
    subset = source.subset or told.subset or found.owner
    if not _SUBSET.fullmatch(subset):
        raise DataError(
            f"{found.url} would be of subset {subset!r}, which is no name for a folder of the "
            "output. Set `subset`."
        )
    is_v2 = told.format is Format.REDPAJAMA_V2
    return SourceFile(
        url=found.url,
        format=told.format,
        subset=subset,
        key=f"{subset}/{told.name or stem(found.relative)}",
        field=source.field or ("raw_content" if is_v2 else "text"),
        filter=source.filter if is_v2 else None,
    )
