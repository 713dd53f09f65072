"""A small corpus without any download: the text of the running Python installation.

Help topics and docstrings become rows of RedPajama's c4 shape, standard-library source becomes rows
of its github shape, all under the Python licence (PSF-2.0, in each row's meta). Files are parsed,
never imported. The same Python gives the same bytes.

Documents travel in units, a module (its source and its docstrings) or one help topic, and a unit
lies on one side of the train/validation split: a docstring held out for validation cannot be read
in the training source. Units are taken in the order of the hash of their text, so asking for more
text never moves a unit to the other side. Near-duplicates across modules exist and stay.
"""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_completedp.data.jsonl import write_rows
from megatron_completedp.errors import ConfigError, DataError

LICENSE = "PSF-2.0"
#: RedPajama rows carry a crawl time; a fixed one keeps the files reproducible.
TIMESTAMP = "2000-01-01T00:00:00Z"
#: Shorter docstrings ("Return the name.") are captions rather than documents.
MIN_DOCSTRING_CHARS = 100

SPLITS = ("train", "valid")
#: RedPajama's file layout below each split; the hex part is the md5 of "python/cpython".
SUBSET_FILES = {
    "c4": "c4/c4-train.00000-of-00001.jsonl",
    "github": f"github/filtered_{hashlib.md5(b'python/cpython').hexdigest()}.sampled.jsonl",
}

# Test data, vendored or third-party code, and tables rather than text (encodings).
_SKIPPED_NAMES = {"encodings", "idlelib", "lib2to3", "pydoc_data", "test", "tests"}
_SKIPPED_NAMES |= {"dist-packages", "site-packages"}
# Generated on the machine that built Python: build flags and paths.
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")

#: RedPajama rows by subset (c4, github).
Rows = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class SplitSummary:
    """What one split of the sample corpus holds."""

    files: list[Path]
    """JSONL files, one per subset."""
    documents: int
    """Rows in all files."""
    text_bytes: int
    """UTF-8 bytes of text in all rows."""


def sample_files(out: Path, split: str) -> list[Path]:
    """Where `write_sample_corpus(out)` puts the JSONL files of `split` (train or valid)."""
    return [out / split / name for name in SUBSET_FILES.values()]


def write_sample_corpus(
    out: Path, *, max_mb: float, valid_mb: float, stdlib: Path | None = None
) -> dict[str, SplitSummary]:
    """Write OUT/{train,valid}/{c4,github}/*.jsonl and return a summary per split.

    At most `max_mb` million bytes of text in all, of which at most `valid_mb` are held out;
    `stdlib` is the folder of standard-library sources (default: the running Python's). Raises
    ConfigError for amounts that make no sense and DataError when a file would be empty.
    """
    if not 0 < valid_mb < max_mb:
        raise ConfigError(
            f"valid_mb is {valid_mb} and max_mb is {max_mb}; expected 0 < valid_mb < max_mb."
        )
    stdlib = stdlib or Path(sysconfig.get_path("stdlib"))
    splits = _fill_splits(stdlib, {"train": max_mb - valid_mb, "valid": valid_mb})
    summaries = {}
    for name, rows_by_subset in splits.items():
        files = sample_files(out, name)
        for path, rows in zip(files, rows_by_subset.values(), strict=True):
            if not rows:
                raise DataError(
                    f"{path} would be empty with max_mb {max_mb} and valid_mb {valid_mb}; raise "
                    f"them (text found in {stdlib})."
                )
            write_rows(path, rows)
        texts = [row["text"] for rows in rows_by_subset.values() for row in rows]
        summaries[name] = SplitSummary(
            files=files, documents=len(texts), text_bytes=_utf8_bytes(texts)
        )
    return summaries


def _fill_splits(stdlib: Path, megabytes: dict[str, float]) -> dict[str, Rows]:
    """Rows of each split: a unit is held out while it fits there, else it is for training."""
    room = {name: int(amount * 1e6) for name, amount in megabytes.items()}
    splits: dict[str, Rows] = {name: {subset: [] for subset in SUBSET_FILES} for name in SPLITS}
    seen: set[str] = set()
    for unit in _units(stdlib):
        new = {subset: _unseen(rows, seen) for subset, rows in unit.items()}
        texts = [row["text"] for rows in new.values() for row in rows]
        size = _utf8_bytes(texts)
        split = "valid" if size <= room["valid"] else "train"
        if size > room[split]:
            break
        room[split] -= size
        for subset, rows in new.items():
            splits[split][subset] += rows
    return splits


def _unseen(rows: list[dict[str, Any]], seen: set[str]) -> list[dict[str, Any]]:
    """The rows whose text is not in `seen`, first of equals only; adds their texts to `seen`."""
    fresh = []
    for row in rows:
        if row["text"] not in seen:
            seen.add(row["text"])
            fresh.append(row)
    return fresh


def _utf8_bytes(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def _units(stdlib: Path) -> Iterator[Rows]:
    """All units in the order of their digests; modules are parsed only when their turn comes."""
    sources: dict[bytes, tuple[str, Path | str]] = {}
    for path in _source_files(stdlib):
        with tokenize.open(path) as stream:  # honours a coding line
            text = stream.read()
        sources.setdefault(hashlib.sha256(text.encode()).digest(), (text, path))
    for topic, text in _topics(stdlib).items():
        sources.setdefault(hashlib.sha256(text.encode()).digest(), (text, topic))
    for _, (text, origin) in sorted(sources.items()):
        if isinstance(origin, Path):
            yield _module_rows(origin.relative_to(stdlib), text)
        else:
            yield {"c4": [_c4_row(text, f"pydoc:{origin}")]}


def _source_files(stdlib: Path) -> list[Path]:
    """Modules that are not empty, sorted: of two with equal text, the first path is named."""
    files = []
    for folder, subfolders, names in os.walk(stdlib):  # can stay out of a large site-packages
        subfolders[:] = [name for name in subfolders if not _skipped(name)]
        files += [
            Path(folder, name) for name in names if name.endswith(".py") and not _skipped(name)
        ]
    return sorted(path for path in files if path.stat().st_size)


def _skipped(name: str) -> bool:
    return name in _SKIPPED_NAMES or name.startswith(_SKIPPED_PREFIXES)


def _topics(stdlib: Path) -> dict[str, str]:
    """The help topics: the one dict literal in pydoc_data/topics.py."""
    path = stdlib / "pydoc_data" / "topics.py"
    if not path.is_file():
        raise DataError(
            f"{path} does not exist, so this Python has no help topics; run with a Python that "
            "has its full standard library."
        )
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(statement.value)
            return topics
    raise DataError(f"{path} holds no dict of topics; expected `topics = {{...}}`.")


def _module_rows(path: Path, source: str) -> Rows:
    """A module's source as a github row and its longer docstrings as c4 rows."""
    module = path.with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
    docstrings = [
        _c4_row(text, f"pydoc:{name}") for name, text in _docstrings(ast.parse(source), module)
    ]
    meta = {
        "content_hash": hashlib.md5(source.encode()).hexdigest(),
        "timestamp": TIMESTAMP,
        "source": "github",
        "repo_name": "python/cpython",
        "ref": f"v{platform.python_version()}",
        "path": f"Lib/{path.as_posix()}",
        "license": LICENSE,
        "language": [{"name": "Python", "bytes": str(len(source.encode()))}],
    }
    return {"c4": docstrings, "github": [{"text": source, "meta": meta}]}


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of a module and of every class and function inside it."""
    scopes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    if isinstance(node, scopes):
        text = ast.get_docstring(node)
        if text and len(text) >= MIN_DOCSTRING_CHARS:
            yield name, text
    for child in ast.iter_child_nodes(node):
        inner = f"{name}.{child.name}" if isinstance(child, scopes[1:]) else name
        yield from _docstrings(child, inner)


def _c4_row(text: str, url: str) -> dict[str, Any]:
    meta = {
        "timestamp": TIMESTAMP,
        "url": url,
        "language": "en",
        "source": "c4",
        "license": LICENSE,
    }
    return {"text": text, "meta": meta}
