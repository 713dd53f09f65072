"""One shard, made once: found finished, made by somebody else, or made now.

A shard is finished when its manifest is there, which is written last, and describes the pair beside
it. Everything else is redone, by whoever holds the shard's lock.
"""

from __future__ import annotations

import glob
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from megatron_completedp.data.claims import claim
from megatron_completedp.data.encoder import Encoder
from megatron_completedp.data.indexed import bin_path, idx_path
from megatron_completedp.data.manifest import ShardManifest, manifest_path, verify_shard
from megatron_completedp.data.shard import write_shard
from megatron_completedp.data.sources import SourceFile
from megatron_completedp.data.streams import open_filesystem
from megatron_completedp.errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ShardOrder:
    """How the shards of a job are to be made."""

    out: Path
    """Folder that the keys of shards are relative to."""
    tokenizer: Path
    """The job's own copy of the tokenizer."""
    tokenizer_sha256: str
    """Hash of that file."""
    engine: Literal["auto", "reference"]
    """As in the job's settings."""
    max_bad_fraction: float
    """As in the job's settings."""

    def prefix(self, file: SourceFile) -> Path:
        """Where the pair of `file` is, without .bin or .idx."""
        return self.out / file.key


class Finished(NamedTuple):
    """A complete shard."""

    manifest: ShardManifest
    made: bool
    """By this call, rather than found."""


def make_shard(
    order: ShardOrder,
    file: SourceFile,
    encoder: Encoder,
    *,
    wait: bool,
    on_progress: Callable[[int, int, int], None] | None = None,
) -> Finished | None:
    """Finish the shard of `file` unless it is finished; None when another process is making it.

    With `wait`, wait for that process instead, and take over what it leaves. `on_progress` gets
    (documents, bytes read, tokens) since its last call. Raises DataError for input that cannot be
    read and for a finished shard of other settings or other input.
    """
    prefix = order.prefix(file)
    with claim(prefix.with_name(prefix.name + ".lock"), wait=wait) as ours:
        if not ours:
            return None
        # Under the lock: until now it could have been finished by another process.
        manifest = finished_shard(order, file)
        if manifest is not None:
            return Finished(manifest, made=False)
        _remove_leftovers(prefix)
        manifest = write_shard(
            file,
            prefix,
            encoder,
            max_bad_fraction=order.max_bad_fraction,
            on_progress=on_progress,
        )
        return Finished(manifest, made=True)


def finished_shard(order: ShardOrder, file: SourceFile) -> ShardManifest | None:
    """The manifest of the shard of `file` if it is finished; None when it is to be made (again).

    Raises DataError when the shard is whole but was made with other settings or from other input:
    redoing it would silently replace finished work.
    """
    prefix = order.prefix(file)
    if not manifest_path(prefix).is_file():
        return None
    try:
        manifest = verify_shard(prefix)
    except DataError as error:
        logger.warning("%s is made again: %s", prefix, error)
        return None
    for name, found, wanted in (
        ("tokenizer_sha256", manifest.tokenizer_sha256, order.tokenizer_sha256),
        ("format", manifest.format, file.format),
        ("field", manifest.field, file.field),
        ("filter", manifest.filter, file.filter),
        ("max_bad_fraction", manifest.max_bad_fraction, order.max_bad_fraction),
        ("input bytes", manifest.inputs[0].bytes, stored_bytes(file)),
    ):
        if found != wanted:
            raise DataError(
                f"{manifest_path(prefix)}: made with {name} {found}; asked for {wanted}. Choose "
                f"another output folder, or delete {prefix}.* to make this shard again."
            )
    return manifest


def stored_bytes(file: SourceFile) -> int:
    """Size of the file as it is stored, so compressed if it is. DataError when it is not there."""
    filesystem, path = open_filesystem(file.url)
    try:
        return int(filesystem.size(path))
    except Exception as error:  # each protocol raises errors of its own library
        raise DataError(f"{file.url} cannot be read ({error}); correct the source.") from error


def _remove_leftovers(prefix: Path) -> None:
    """Temporary files of a process that was killed while it made the shard at `prefix`.

    Only the holder of the shard's lock may call this: the files of a live process look the same.
    """
    for path in (bin_path(prefix), idx_path(prefix), manifest_path(prefix)):
        for leftover in path.parent.glob(f"{glob.escape(path.name)}.tmp*"):
            leftover.unlink()
