"""One file to one pair and its manifest: complete and told, or not there."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_samples import TEXTS, small_tokenizer, write_jsonl

from megatron_completedp.data import readers
from megatron_completedp.data.encoder import Encoder, EnginesDisagree
from megatron_completedp.data.indexed import bin_path, check_pair, idx_path, open_pair
from megatron_completedp.data.indexed_writer import open_indexed
from megatron_completedp.data.manifest import (
    ShardManifest,
    load_manifest,
    manifest_path,
    verify_shard,
    write_manifest,
)
from megatron_completedp.data.redpajama_v2 import V2Filter
from megatron_completedp.data.shard import write_shard
from megatron_completedp.data.sources import Source, SourceFile, find_files
from megatron_completedp.errors import DataError


@pytest.fixture
def encoder(tmp_path: Path) -> Encoder:
    return Encoder(small_tokenizer(tmp_path))


def source(path: Path) -> SourceFile:
    (file,) = find_files([Source(path=str(path))])
    return file


def rows(path: Path, count: int = 200) -> SourceFile:
    """Documents, and among them a torn row, an empty one, half a surrogate pair and a literal."""
    texts = [f"{TEXTS[i % 3]} number {i} caf\u00e9" for i in range(count)]
    write_jsonl(path, [*texts, "an end </s> in the text"])
    with path.open("ab") as stream:
        stream.write(b'{"text": "torn\n{"text": ""}\n{"text": "half \\ud83d of one"}\n')
    return source(path)


def make(file: SourceFile, prefix: Path, encoder: Encoder, **options: Any) -> ShardManifest:
    return write_shard(file, prefix, encoder, max_bad_fraction=0.01, **options)


def contents(prefix: Path) -> list[bytes]:
    return [path(prefix).read_bytes() for path in (bin_path, idx_path, manifest_path)]


def test_a_pair_holds_every_document_and_its_manifest_says_what(
    tmp_path: Path, encoder: Encoder
) -> None:
    file, tokenizer = rows(tmp_path / "c4.jsonl"), encoder.tokenizer
    manifest = make(file, tmp_path / "out.v1" / "c4", encoder)
    prefix = tmp_path / "out.v1" / "c4"
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["c4.bin", "c4.idx", "c4.json"]

    ids, lengths = open_pair(prefix)
    documents = [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]
    assert all(document[-1] == tokenizer.eod for document in documents)
    texts = [f"{TEXTS[i % 3]} number {i} caf\u00e9" for i in range(200)]
    texts += ["an end </s> in the text", "half \ufffd of one"]
    assert [tokenizer.decode(document[:-1]) for document in documents] == texts

    content = (tmp_path / "c4.jsonl").read_bytes()
    fast = encoder.name.startswith("gigatoken ")
    assert dataclasses.replace(manifest, files={}, inputs=()) == ShardManifest(
        documents=202,
        tokens=ids.size,
        text_bytes=sum(len(text.encode()) for text in texts),
        skipped={"torn_json": 1, "empty_text": 1},
        repaired_documents=1,
        control_literal_documents=1,
        max_token_id=int(ids.max()),
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        dtype="uint16",
        tokenizer_sha256=tokenizer.sha256,
        engine=encoder.name,
        # gigatoken leaves it the document with the literal; without gigatoken it has all.
        reference_documents=1 if fast else 202,
        compared_documents=1 if fast else 0,
        disagreement=None,
        format=file.format,
        field="text",
        filter=None,
        max_bad_fraction=0.01,
        inputs=(),
        files={},
    )
    assert [(item.url, item.bytes, item.sha256) for item in manifest.inputs] == [
        (file.url, len(content), hashlib.sha256(content).hexdigest())
    ]
    for name, path in (("bin", bin_path(prefix)), ("idx", idx_path(prefix))):
        written = path.read_bytes()
        assert manifest.files[name].bytes == len(written)
        assert manifest.files[name].sha256 == hashlib.sha256(written).hexdigest()
    assert manifest.tokens_per_byte == manifest.tokens / manifest.text_bytes
    assert load_manifest(prefix) == manifest
    assert verify_shard(prefix, hashes=True) == manifest


def test_the_same_bytes_in_other_batches_and_again(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = rows(tmp_path / "c4.jsonl")
    told: list[tuple[int, int, int]] = []
    manifest = make(file, tmp_path / "a", encoder, on_progress=lambda *done: told.append(done))
    size = (tmp_path / "c4.jsonl").stat().st_size
    assert told == [(manifest.documents, size, manifest.tokens)], "one batch"
    told.clear()
    monkeypatch.setattr(readers, "BATCH_BYTES", 3000)
    make(file, tmp_path / "b", encoder, on_progress=lambda *done: told.append(done))
    assert len(told) > 10
    assert tuple(map(sum, zip(*told, strict=True))) == (manifest.documents, size, manifest.tokens)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    make(file, tmp_path / "b", encoder)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_engines_that_disagree_leave_all_to_the_reference(
    tmp_path: Path,
    encoder: Encoder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    file = rows(tmp_path / "c4.jsonl")
    monkeypatch.setattr(readers, "BATCH_BYTES", 3000)
    reference = Encoder(encoder.tokenizer, engine="reference")
    alone = make(file, tmp_path / "alone", reference)
    right = encoder.encode

    def wrong(texts: Any, counts: Any) -> Any:
        if counts.documents > 50:
            raise EnginesDisagree(counts.documents + 3)
        return right(texts, counts)

    monkeypatch.setattr(encoder, "encode", wrong)
    told: list[tuple[int, int, int]] = []
    with caplog.at_level(logging.WARNING):
        redone = make(file, tmp_path / "b", encoder, on_progress=lambda *done: told.append(done))
    assert "is left to sentencepiece" in caplog.text
    assert redone.disagreement is not None
    assert redone.disagreement > 50
    assert dataclasses.replace(redone, disagreement=None) == alone
    assert contents(tmp_path / "b")[:2] == contents(tmp_path / "alone")[:2]
    assert min(told) < (0, 0, 0), "what was told of the first try is taken back"
    size = (tmp_path / "c4.jsonl").stat().st_size
    assert tuple(map(sum, zip(*told, strict=True))) == (alone.documents, size, alone.tokens)


@pytest.mark.parametrize("error", [DataError("bad input"), OSError("full"), KeyboardInterrupt()])
def test_an_error_leaves_no_finished_pair(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    file, prefix = rows(tmp_path / "c4.jsonl"), tmp_path / "out" / "c4"
    make(file, prefix, encoder)
    monkeypatch.setattr(readers, "BATCH_BYTES", 3000)

    def stop(*_: int) -> None:
        raise error

    with pytest.raises(type(error)):
        make(file, prefix, encoder, on_progress=stop)
    # The old pair is still whole, but whether it is what was asked for is not known any more.
    assert sorted(path.suffix for path in prefix.parent.iterdir()) == [".bin", ".idx"]


def test_too_many_bad_rows_leave_nothing(tmp_path: Path, encoder: Encoder) -> None:
    path = write_jsonl(tmp_path / "c4.jsonl", TEXTS)
    with path.open("a") as stream:
        stream.write('{"text": 3}\n')
    with pytest.raises(DataError, match=r"c4\.jsonl:4"):
        make(source(path), tmp_path / "out" / "c4", encoder)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_filter_comes_back(tmp_path: Path, encoder: Encoder) -> None:
    manifest = make(rows(tmp_path / "c4.jsonl"), tmp_path / "a", encoder)
    filtered = dataclasses.replace(manifest, filter=V2Filter(maximum={"ccnet_perplexity": 300.5}))
    write_manifest(tmp_path / "a", filtered)
    assert load_manifest(tmp_path / "a") == filtered
    assert filtered != manifest


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def damage(prefix: Path) -> None:
        tree = json.loads(manifest_path(prefix).read_bytes())
        change(tree)
        manifest_path(prefix).write_text(json.dumps(tree))

    return damage


def flip_a_bit(prefix: Path) -> None:
    content = bytearray(bin_path(prefix).read_bytes())
    content[100] ^= 1
    bin_path(prefix).write_bytes(content)


def cut(prefix: Path) -> None:
    bin_path(prefix).write_bytes(bin_path(prefix).read_bytes()[:-2])


def other_lengths(prefix: Path) -> None:
    """A whole pair of the same size, with other documents."""
    ids, lengths = open_pair(prefix)
    ids = np.array(ids)
    with open_indexed(prefix, 330) as writer:
        lengths = np.array([lengths[0] + 1, lengths[1] - 1, *lengths[2:-2], lengths[-2:].sum()])
        writer.add_documents(ids, lengths)
    check_pair(prefix)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda prefix: manifest_path(prefix).unlink(), r"a\.json cannot be read"),
        (lambda prefix: manifest_path(prefix).write_text("{"), r"a\.json is not the manifest"),
        (lambda prefix: manifest_path(prefix).write_text("[]"), r"a\.json is not the manifest"),
        (edit(lambda tree: tree.pop("inputs")), "'inputs'"),
        (edit(lambda tree: tree.update(more=1)), "more"),
        (edit(lambda tree: tree.update(format="xml")), "xml"),
        (edit(lambda tree: tree.update(version=2)), r"has version 2; expected 1"),
        (edit(lambda tree: tree.update(documents=7)), r"a\.idx has documents 202; .* says 7\."),
        (edit(lambda tree: tree.update(dtype="int32")), r"has dtype uint16; .* says int32"),
        (lambda prefix: bin_path(prefix).unlink(), r"a\.bin does not exist; its manifest says"),
        (cut, r"a\.bin has [\d,]+ bytes; its manifest says [\d,]+ bytes"),
        (other_lengths, r"a\.idx has .* bytes; its manifest says"),
    ],
)
def test_damage_is_named(
    tmp_path: Path, encoder: Encoder, damage: Callable[[Path], object], message: str
) -> None:
    prefix = tmp_path / "a"
    make(rows(tmp_path / "c4.jsonl"), prefix, encoder)
    verify_shard(prefix)  # the control: it is the damage that is refused
    damage(prefix)
    with pytest.raises(DataError, match=message):
        verify_shard(prefix)


def test_a_flipped_bit_shows_in_the_hash_alone(tmp_path: Path, encoder: Encoder) -> None:
    prefix = tmp_path / "a"
    make(rows(tmp_path / "c4.jsonl"), prefix, encoder)
    flip_a_bit(prefix)
    verify_shard(prefix)
    with pytest.raises(DataError, match=r"a\.bin has sha256 .* changed after it was written"):
        verify_shard(prefix, hashes=True)
