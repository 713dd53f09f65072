"""The encoder's ids are those of the tokenizer's own library, whichever engine made them."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from data_samples import TEXTS
from fuzz_texts import fuzz_texts
from tokenizer_samples import (
    byte_level_json,
    sentencepiece_model,
    split_like_gpt4,
    without_normalizer,
)

from megatron_completedp.data import encoder as encoder_module
from megatron_completedp.data.encoder import EncodeCounts, Encoder, EnginesDisagree
from megatron_completedp.data.fast_engine import FastEngine, find_literals
from megatron_completedp.data.tokenizer import Tokenizer, load_tokenizer

pytest.importorskip("gigatoken")
pytest.importorskip("tokenizers")

TRUSTED: dict[str, Callable[[Path], Path]] = {
    "sentencepiece": lambda folder: sentencepiece_model(folder / "t.model"),
    "sentencepiece with a first space": lambda folder: sentencepiece_model(
        folder / "t.model", add_dummy_prefix=True, control_symbols=["<pad>"]
    ),
    "byte-level with NFC": lambda folder: byte_level_json(folder / "t.json"),
    "byte-level as GPT-2": lambda folder: byte_level_json(folder / "t.json", without_normalizer),
    "byte-level as GPT-4": lambda folder: byte_level_json(folder / "t.json", split_like_gpt4),
}


def expected(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """What the library gives, and the end of each document."""
    return [[*ids, tokenizer.eod] for ids in tokenizer.encode_batch(texts)]


def documents(ids: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
    assert lengths.sum() == ids.size
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]


def assert_same(encoder: Encoder, texts: Sequence[str], counts: EncodeCounts) -> None:
    """Equal ids, in batches of 500; the first text that differs is shown."""
    for start in range(0, len(texts), 500):
        batch = texts[start : start + 500]
        found = documents(*encoder.encode(batch, counts))
        wanted = expected(encoder.tokenizer, batch)
        for text, ours, theirs in zip(batch, found, wanted, strict=True):
            assert ours == theirs, ascii(text)


@pytest.mark.parametrize("kind", TRUSTED)
def test_ids_of_the_library_on_fuzzed_texts(tmp_path: Path, kind: str) -> None:
    tokenizer = load_tokenizer(TRUSTED[kind](tmp_path))
    encoder = Encoder(tokenizer)
    assert encoder.name.startswith("gigatoken ")
    texts = list(fuzz_texts(2000, seed=5))
    counts = EncodeCounts()
    assert_same(encoder, texts, counts)
    assert counts.documents == 2000
    assert counts.text_bytes == sum(len(text.encode()) for text in texts)
    literals = sum(any(word in text for word in tokenizer.control_literals) for text in texts)
    assert counts.control_literal_documents == literals > 0
    knows_all = kind in ("byte-level as GPT-2", "byte-level as GPT-4")
    assert (counts.reference_documents == 0) is knows_all
    assert counts.reference_documents < 600, "gigatoken had nearly all"


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level with NFC"])
def test_the_fuzzed_texts_tell_the_engines_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The control of the test above: gigatoken alone does not pass it."""
    encoder = Encoder(load_tokenizer(TRUSTED[kind](tmp_path)))
    assert encoder._fast is not None
    monkeypatch.setattr(encoder._fast, "differs", find_literals([]))
    monkeypatch.setattr(encoder, "_compare_sample", lambda *_: None)
    with pytest.raises(AssertionError):
        assert_same(encoder, list(fuzz_texts(2000, seed=5)), EncodeCounts())


def test_the_reference_alone(tmp_path: Path) -> None:
    encoder = Encoder(load_tokenizer(byte_level_json(tmp_path / "t.json")), engine="reference")
    counts = EncodeCounts()
    assert_same(encoder, ["", *TEXTS, "a \ufffd b"], counts)
    assert encoder.name == encoder.tokenizer.reference_library
    assert (counts.reference_documents, counts.compared_documents) == (5, 0)


@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_no_text(tmp_path: Path, engine: Any) -> None:
    encoder = Encoder(load_tokenizer(sentencepiece_model(tmp_path / "t.model")), engine=engine)
    ids, lengths = encoder.encode([], EncodeCounts())
    assert (ids.size, lengths.size) == (0, 0)


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level with NFC"])
def test_long_documents_beside_short_ones(tmp_path: Path, kind: str) -> None:
    """Half a megabyte of text, and of what has no place to cut it."""
    encoder = Encoder(load_tokenizer(TRUSTED[kind](tmp_path)))
    texts = ["x", TEXTS[1] * 3000, "", "a" * 50_000, "\n" * 50_000, "e\u0301" * 25_000, "</s>"]
    assert_same(encoder, texts, EncodeCounts())


def single_word(content: dict[str, Any]) -> None:
    content["added_tokens"][-1] |= {"content": "fox", "single_word": True}


def lowercase(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Lowercase"}


def with_dropout(content: dict[str, Any]) -> None:
    content["model"]["dropout"] = 0.1


UNTRUSTED: dict[str, Callable[[Path], Path]] = {
    "nmt_nfkc": lambda folder: sentencepiece_model(
        folder / "t.model", normalization_rule_name="nmt_nfkc"
    ),
    "extra white space": lambda folder: sentencepiece_model(
        folder / "t.model", remove_extra_whitespaces=True
    ),
    "user-defined": lambda folder: sentencepiece_model(
        folder / "t.model", user_defined_symbols=["fox", "    "]
    ),
    "unigram": lambda folder: sentencepiece_model(
        folder / "t.model", model_type="unigram", vocab_size=340
    ),
    "single_word": lambda folder: byte_level_json(folder / "t.json", single_word),
    "lowercase": lambda folder: byte_level_json(folder / "t.json", lowercase),
    "dropout": lambda folder: byte_level_json(folder / "t.json", with_dropout),
}


@pytest.mark.parametrize("kind", UNTRUSTED)
def test_other_kinds_are_left_to_their_library(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    tokenizer = load_tokenizer(UNTRUSTED[kind](tmp_path))
    with caplog.at_level(logging.WARNING):
        encoder = Encoder(tokenizer)
    assert encoder.name == tokenizer.reference_library
    assert "is left to" in caplog.text
    if kind != "dropout":  # whose ids are drawn
        assert_same(encoder, ["the fox    jumps", "\ufb01\u0301 "], EncodeCounts())


def test_without_gigatoken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    tokenizer = load_tokenizer(sentencepiece_model(tmp_path / "t.model"))
    with caplog.at_level(logging.WARNING):
        assert Encoder(tokenizer).name == tokenizer.reference_library
    assert "pip install gigatoken" in caplog.text


def sampled(encoder: Encoder, texts: Sequence[str], batch: int) -> tuple[int, EncodeCounts]:
    """The document at which the engines disagree, or -1."""
    counts = EncodeCounts()
    try:
        for start in range(0, len(texts), batch):
            encoder.encode(texts[start : start + batch], counts)
    except EnginesDisagree as error:
        return error.document, counts
    return -1, counts


def test_the_sample_depends_on_the_texts_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of documents of 100 bytes, each tenth begins after another stretch of 1,000."""
    monkeypatch.setattr(encoder_module, "SAMPLE_EVERY_BYTES", 1000)
    encoder = Encoder(load_tokenizer(sentencepiece_model(tmp_path / "t.model")))
    texts = [f"{i:04} {'fox ' * 23}..." for i in range(100)]
    assert {len(text) for text in texts} == {100}
    right = FastEngine.encode_one

    def wrong_from_75(engine: FastEngine, data: bytes) -> np.ndarray:
        ids = right(engine, data)
        return ids[:-1] if int(data[:4]) >= 75 else ids

    for batch in (7, 100):
        document, counts = sampled(encoder, texts, batch)
        assert (document, counts.compared_documents) == (-1, 10)
    monkeypatch.setattr(FastEngine, "encode_one", wrong_from_75)
    for batch in (7, 100):
        document, counts = sampled(encoder, texts, batch)
        # 0, 10, ... 70 were equal; 75 to 79 are wrong and not in the sample.
        assert (document, counts.compared_documents) == (80, 8)


def test_a_long_document_is_sampled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_module, "SAMPLE_EVERY_BYTES", 1000)
    encoder = Encoder(load_tokenizer(sentencepiece_model(tmp_path / "t.model")))
    _, counts = sampled(encoder, ["fox " * 5000, "dog", "fox"], 2)
    assert counts.compared_documents == 2


DATA = os.environ.get("COMPLETEDP_DATA", "")
needs_data = pytest.mark.skipif(not DATA, reason="COMPLETEDP_DATA names no folder of real text")
REAL = (
    "gpt-neox-20b.tokenizer.json",
    "gpt2.tokenizer.json",
    "mistral-v1-32k.spm.model",
    "own-32k.spm.model",
)


@pytest.fixture(scope="module")
def articles() -> list[str]:
    with zstandard.open(Path(DATA) / "corpus/wikipedia/wiki.jsonl.zst", "rt") as stream:
        texts = [json.loads(next(stream))["text"] for _ in range(10_000)]
    return [*texts, "".join(texts)[:10_000_000]]


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_ids_of_the_library_on_real_documents(name: str, articles: list[str]) -> None:
    """10,000 articles, and 10 MB of them in one document; then 20,000 fuzzed texts."""
    encoder = Encoder(load_tokenizer(Path(DATA) / "tokenizers" / name))
    assert encoder.name.startswith("gigatoken ")
    counts = EncodeCounts()
    assert_same(encoder, articles, counts)
    assert counts.reference_documents < 10
    assert_same(encoder, list(fuzz_texts(20_000, seed=6)), counts)


@pytest.mark.slow
def test_every_mark_that_the_engines_order_differently_is_known(tmp_path: Path) -> None:
    """After U+0345, of the highest combining class, every other mark has to move before it."""
    encoder = Encoder(load_tokenizer(byte_level_json(tmp_path / "t.json")))
    # The planes beyond have no marks.
    points = [c for c in range(0x80, 0x20000) if not 0xD800 <= c < 0xE000]
    for start in range(0, len(points), 20_000):
        texts = ["\u0345" + chr(c) for c in points[start : start + 20_000]]
        found = documents(*encoder.encode(texts, EncodeCounts()))
        assert found == expected(encoder.tokenizer, texts)
