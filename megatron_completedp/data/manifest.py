"""PREFIX.json: what went into a pair of token files, and what the files must be.

It is written last, so where it exists the pair beside it was complete. It holds no times and no
names of machines: the same input gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_completedp.data.atomic import atomic_write
from megatron_completedp.data.indexed import bin_path, check_pair, idx_path
from megatron_completedp.data.indexed_writer import FileRecord
from megatron_completedp.data.layout import Format
from megatron_completedp.data.redpajama_v2 import V2Filter
from megatron_completedp.data.streams import InputFile
from megatron_completedp.errors import CompletedPError, DataError

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ShardManifest:
    """What was read, with which settings, and what was written."""

    documents: int
    """Documents written."""
    tokens: int
    """Token ids written, one end-of-document id per document included."""
    text_bytes: int
    """UTF-8 bytes of the texts written."""
    skipped: Mapping[str, int]
    """Rows left out, by reason."""
    repaired_documents: int
    """Documents in which lone surrogates were replaced by U+FFFD."""
    control_literal_documents: int
    """Documents whose text spells a control token, such as <|endoftext|> or </s>."""
    max_token_id: int
    """Largest id written."""
    vocab_size: int
    """Ids the tokenizer can produce; the model's vocab_size."""
    eod: int
    """The id that ends each document."""
    dtype: str
    """How the ids are stored: uint16 or int32."""
    tokenizer_sha256: str
    """Which tokenizer file made the ids."""
    engine: str
    """Which library, and version, encoded the texts."""
    reference_documents: int
    """Of the documents, those that the tokenizer's own library encoded."""
    compared_documents: int
    """Documents whose head was encoded by both, with equal results."""
    disagreement: int | None
    """The document whose heads differed, so that the tokenizer's own library encoded all of them.

    None where none did.
    """
    format: Format
    """How the rows were stored."""
    field: str
    """Key or column of the text."""
    filter: V2Filter | None
    """For RedPajama-V2, which documents were kept."""
    max_bad_fraction: float
    """Share of bad rows that was allowed."""
    inputs: tuple[InputFile, ...]
    """What was read, as stored."""
    files: Mapping[str, FileRecord]
    """What .bin and .idx must be, under "bin" and "idx"."""

    @property
    def tokens_per_byte(self) -> float:
        """Tokens per UTF-8 byte of text: turns nats per token into bits per byte."""
        return self.tokens / self.text_bytes


def manifest_path(prefix: Path) -> Path:
    """PREFIX.json; the suffix is appended, so that a dot in the prefix is kept."""
    return prefix.with_name(prefix.name + ".json")


def write_manifest(prefix: Path, manifest: ShardManifest) -> None:
    """Write PREFIX.json: from here on the pair at `prefix` is complete."""
    tree = {"version": VERSION, **vars(manifest)}
    with atomic_write(manifest_path(prefix)) as stream:
        stream.write(json.dumps(tree, indent=1, default=_plain).encode() + b"\n")


def _plain(value: object) -> dict[str, Any]:
    """What json writes for the dataclasses in a manifest, and for read-only views of a config."""
    return dict(value) if isinstance(value, Mapping) else vars(value)


def load_manifest(prefix: Path) -> ShardManifest:
    """Read PREFIX.json. Raises DataError when it is missing, garbled or of another version."""
    path = manifest_path(prefix)
    try:
        tree = json.loads(path.read_bytes())
        version = tree.pop("version")
        manifest = _build(tree) if version == VERSION else None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); {_AGAIN}.") from error
    except (ValueError, TypeError, LookupError, AttributeError, CompletedPError) as error:
        raise DataError(f"{path} is not the manifest of a pair ({error!r}); {_AGAIN}.") from error
    if manifest is None:
        raise DataError(f"{path} has version {version!r}; expected {VERSION}. {_FIX}")
    return manifest


def text_hashes(prefixes: Iterable[str]) -> dict[str, str]:
    """SHA-256 of the token files by prefix, as their manifests have it; without one left out."""
    return {
        prefix: load_manifest(Path(prefix)).files["bin"].sha256
        for prefix in prefixes
        if manifest_path(Path(prefix)).exists()
    }


_AGAIN = "make the pair again with tools/preprocess_redpajama.py, or copy it again"


def _build(tree: dict[str, Any]) -> ShardManifest:
    """The inverse of `write_manifest`, less the version."""
    parsed = {
        "format": Format(tree["format"]),
        "filter": V2Filter(**tree["filter"]) if tree["filter"] else None,
        "inputs": tuple(InputFile(**item) for item in tree["inputs"]),
        "files": {name: FileRecord(**tree["files"][name]) for name in ("bin", "idx")},
    }
    return ShardManifest(**{**tree, **parsed})


def verify_shard(prefix: Path, *, hashes: bool = False) -> ShardManifest:
    """Hold the pair at `prefix` to its manifest, which is returned.

    Sizes, counts and dtype are always compared, and the index is checked in itself; with `hashes`,
    every byte of both files is read and compared too. Raises DataError naming the file, what was
    found and what was expected.
    """
    manifest = load_manifest(prefix)
    paths = {"bin": bin_path(prefix), "idx": idx_path(prefix)}
    for name, path in paths.items():
        found = path.stat().st_size if path.is_file() else None
        expected = manifest.files[name].bytes
        if found != expected:
            has = "does not exist" if found is None else f"has {found:,} bytes"
            raise DataError(f"{path} {has}; its manifest says {expected:,} bytes. {_FIX}")
    pair = check_pair(prefix)
    for name in ("documents", "tokens", "dtype"):
        found, expected = getattr(pair, name), getattr(manifest, name)
        if found != expected:
            raise DataError(
                f"{paths['idx']} has {name} {found}; its manifest says {expected}. {_FIX}"
            )
    for name, path in paths.items() if hashes else ():
        with path.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        if sha256 != manifest.files[name].sha256:
            raise DataError(
                f"{path} has sha256 {sha256}; its manifest says {manifest.files[name].sha256}: it "
                f"was changed after it was written. {_FIX}"
            )
    return manifest


_FIX = f"{_AGAIN.capitalize()}."
