"""`manifest.json`: the size and SHA-256 of every file of a checkpoint, and of itself.

A checkpoint whose manifest verifies is, byte for byte, what was written. Needs neither torch nor
Megatron.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_completedp.errors import CheckpointError

MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True)
class FileRecord:
    """What a file must be."""

    size: int
    """Bytes."""
    sha256: str


def seal(path: Path) -> FileRecord:
    """The record of `path`, whose bytes are on the disk when this returns.

    Raises OSError when it cannot be read or synced.
    """
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        return FileRecord(size=file.tell(), sha256=sha256)


def write_manifest(folder: Path, files: Mapping[str, FileRecord]) -> None:
    """Write the manifest of `files`, by name within `folder`, and bring it to the disk."""
    records = {name: asdict(files[name]) for name in sorted(files)}
    with (folder / MANIFEST_FILE).open("w", encoding="utf-8") as file:
        json.dump({"files": records, "sha256": _own_hash(records)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def verify(folder: Path, *, contents: bool = True, part: int = 0, parts: int = 1) -> None:
    """Raise CheckpointError, naming file, expected and found, unless `folder` is as it was written.

    The manifest, the names and the sizes are always checked; of the contents, every `parts`-th file
    from number `part` on, so that `parts` callers share the reading, or none without `contents`.
    """
    records = _read_manifest(folder)
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if not path.is_dir()}
    del found[MANIFEST_FILE]
    for name in sorted(records.keys() | found.keys()):
        if name not in found:
            raise CheckpointError(f"{folder / name} is missing; the manifest lists it.")
        if name not in records:
            raise CheckpointError(f"{folder / name} is not in the manifest; it was added later.")
        size = found[name].stat().st_size
        if size != records[name].size:
            raise CheckpointError(
                f"{folder / name} has {size} bytes; expected {records[name].size}."
            )
    for name in sorted(records)[part::parts] if contents else ():
        _verify_content(found[name], records[name])


def _verify_content(path: Path, record: FileRecord) -> None:
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    if sha256 != record.sha256:
        raise CheckpointError(f"{path} has SHA-256 {sha256[:12]}; expected {record.sha256[:12]}.")


def _read_manifest(folder: Path) -> dict[str, FileRecord]:
    path = folder / MANIFEST_FILE
    try:
        content = json.loads(path.read_bytes())
        records = {name: FileRecord(**entry) for name, entry in content["files"].items()}
        expected = content["sha256"]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is garbled ({error!r}); expected a manifest.") from error
    found = _own_hash(content["files"])
    if found != expected:
        raise CheckpointError(f"{path} has SHA-256 {found[:12]}; expected {str(expected)[:12]}.")
    return records


def _own_hash(records: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()
