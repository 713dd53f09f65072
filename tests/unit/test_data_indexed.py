"""Writing token files atomically, and refusing the ones that are not whole."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_completedp.data.atomic import atomic_write
from megatron_completedp.data.indexed import (
    bin_path,
    check_pair,
    idx_path,
    open_pair,
    token_dtype,
)
from megatron_completedp.data.indexed_writer import IndexedWriter, open_indexed
from megatron_completedp.errors import DataError

DOCUMENTS = [[5, 6, 7, 2], [8, 2], [9, 9, 9, 9, 2]]
HEADER_BYTES = 34  # 9 magic, 8 version, 1 dtype code, 8 + 8 counts


def write_pair(prefix: Path, documents: list[list[int]] = DOCUMENTS, vocab_size: int = 10) -> Path:
    with open_indexed(prefix, vocab_size) as writer:
        for ids in documents:
            writer.add_documents(np.array(ids, np.int64), np.array([len(ids)]))
    return prefix


def test_a_whole_pair_passes_with_its_counts(tmp_path: Path) -> None:
    summary = check_pair(write_pair(tmp_path / "train.v1"))
    assert (summary.documents, summary.sequences, summary.tokens) == (3, 3, 11)
    assert summary.dtype == "uint16"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.v1.bin", "train.v1.idx"]


def test_ids_are_stored_back_to_back(tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "train")
    assert np.fromfile(bin_path(prefix), dtype="<u2").tolist() == [
        i for ids in DOCUMENTS for i in ids
    ]


@pytest.mark.parametrize(
    ("vocab_size", "dtype", "top"), [(65_499, "uint16", 65_498), (65_500, "int32", 65_499)]
)
def test_dtype_follows_the_vocabulary(
    tmp_path: Path, vocab_size: int, dtype: str, top: int
) -> None:
    prefix = write_pair(tmp_path / "train", [[0, top]], vocab_size)
    assert check_pair(prefix).dtype == dtype
    stored = np.fromfile(bin_path(prefix), dtype=token_dtype(vocab_size))
    assert stored.tolist() == [0, top]


@pytest.mark.parametrize("ids", [[3, 10], [-1, 3], [65_536 + 3]])
def test_an_id_outside_the_vocabulary_is_refused(tmp_path: Path, ids: list[int]) -> None:
    with pytest.raises(DataError, match="expected 0 to 9"):
        write_pair(tmp_path / "train", [ids])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["uint32", "int64", "uint16"])
def test_documents_at_once_are_documents_one_by_one(tmp_path: Path, kind: str) -> None:
    write_pair(tmp_path / "one")
    ids = np.array([i for document in DOCUMENTS for i in document], kind)
    with open_indexed(tmp_path / "all", 10) as writer:
        writer.add_documents(ids[:4], np.array([4]))
        writer.add_documents(ids[:0], np.array([], np.int64))
        writer.add_documents(ids[4:], np.array([2, 5]))
        assert (writer.tokens, writer.max_token_id) == (11, 9)
    for name, path in (("bin", bin_path), ("idx", idx_path)):
        content = path(tmp_path / "one").read_bytes()
        assert path(tmp_path / "all").read_bytes() == content
        record = writer.files[name]
        assert record.bytes == len(content)
        assert record.sha256 == hashlib.sha256(content).hexdigest()
    stored, lengths = open_pair(tmp_path / "all")
    assert stored.tolist() == ids.tolist()
    assert lengths.tolist() == [4, 2, 5]


@pytest.mark.parametrize(
    ("ids", "lengths", "message"),
    [
        ([1, 2, 3, 10, 4], [2, 1, 2], "document 5 holds the token id 10; expected 0 to 9"),
        ([1, 2, -1, 3, 4], [2, 1, 2], "document 4 holds the token id -1; expected 0 to 9"),
        ([1, 2, 3], [2, 0, 1], "document 4 has no token"),
    ],
)
def test_the_document_at_fault_is_counted(
    tmp_path: Path, ids: list[int], lengths: list[int], message: str
) -> None:
    def write_both() -> None:
        with open_indexed(tmp_path / "a", 10) as writer:
            writer.add_documents(np.array([1, 1, 1]), np.array([1, 1, 1]))
            writer.add_documents(np.array(ids), np.array(lengths))

    with pytest.raises(DataError, match=message):
        write_both()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("documents", [[], [[]]])
def test_no_token_is_refused(tmp_path: Path, documents: list[list[int]]) -> None:
    with pytest.raises(DataError, match=r"no (document|token)"):
        write_pair(tmp_path / "train", documents)
    assert list(tmp_path.iterdir()) == []


def edit(offset: int, new: bytes) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        assert content[offset : offset + len(new)] != new, "the damage must change something"
        content[offset : offset + len(new)] = new
        path.write_bytes(content)

    return damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def extend(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path: Path) -> None:
    path.write_bytes(b"")


AFTER_LENGTHS = HEADER_BYTES + 3 * 4
AFTER_OFFSETS = AFTER_LENGTHS + 3 * 8


@pytest.mark.parametrize(
    ("suffix", "damage", "message"),
    [
        ("bin", Path.unlink, r"train\.bin does not exist"),
        ("idx", Path.unlink, r"train\.idx does not exist"),
        ("bin", empty, r"train\.bin is empty"),
        ("idx", empty, r"train\.idx is empty"),
        ("bin", cut, r"has 21 bytes; its index counts 11 uint16 tokens, 22 bytes"),
        ("bin", extend, r"has 23 bytes; its index counts 11 uint16 tokens, 22 bytes"),
        ("idx", cut, r"has 101 bytes; .* 3 sequences and 3 documents, 102 bytes.*truncated"),
        ("idx", extend, r"has 103 bytes; .* 102 bytes.*followed by"),
        ("idx", lambda path: path.write_bytes(path.read_bytes()[:20]), r"20 bytes; its header"),
        ("idx", edit(0, b"X"), r"starts with b'XMIDIDX.*expected b'MMIDIDX"),
        ("idx", edit(9, struct.pack("<Q", 2)), r"version 2; expected 1"),
        ("idx", edit(17, b"\x07"), r"dtype code 7; expected 8 \(uint16\) or 4 \(int32\)"),
        ("idx", edit(17, b"\x04"), r"byte offsets"),
        ("idx", edit(HEADER_BYTES, struct.pack("<ii", 2, 4)), r"byte offsets"),
        ("idx", edit(HEADER_BYTES, struct.pack("<i", -4)), r"a sequence of -4 tokens"),
        ("idx", edit(AFTER_LENGTHS + 8, struct.pack("<q", 6)), r"byte offsets"),
        ("idx", edit(AFTER_OFFSETS, struct.pack("<q", 1)), r"do not run from 0 to 3"),
        ("idx", edit(AFTER_OFFSETS + 24, struct.pack("<q", 2)), r"do not run from 0 to 3"),
        ("idx", edit(AFTER_OFFSETS + 8, struct.pack("<qq", 2, 1)), r"go backwards"),
    ],
)
def test_damage_is_named(
    tmp_path: Path, suffix: str, damage: Callable[[Path], None], message: str
) -> None:
    prefix = write_pair(tmp_path / "train")
    check_pair(prefix)  # the control: it is the damage that is refused
    damage(tmp_path / f"train.{suffix}")
    with pytest.raises(DataError, match=message):
        check_pair(prefix)


def test_an_exception_keeps_the_pair_that_was_there(tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "train")
    before = bin_path(prefix).read_bytes(), idx_path(prefix).read_bytes()
    with pytest.raises(DataError, match="document 1 has no token"):
        write_pair(prefix, [[1], []])
    assert (bin_path(prefix).read_bytes(), idx_path(prefix).read_bytes()) == before
    assert len(list(tmp_path.iterdir())) == 2


def test_no_index_describes_a_newer_bin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dying between the two renames must leave a pair that `check_pair` refuses."""
    prefix = write_pair(tmp_path / "train")

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(IndexedWriter, "write_index", die)
    with pytest.raises(KeyboardInterrupt):
        write_pair(prefix, DOCUMENTS[::-1])  # same sizes: only the missing index tells
    with pytest.raises(DataError, match=r"train\.idx does not exist"):
        check_pair(prefix)


def test_atomic_write_shows_nothing_before_its_end(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    with atomic_write(path) as stream:
        stream.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    with pytest.raises(TypeError), atomic_write(path) as stream:
        stream.writelines([b"torn", None])  # type: ignore[list-item]
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]
