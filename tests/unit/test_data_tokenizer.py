"""Tokenizers: lossless, deterministic, and the libraries' own ids, for control tokens too."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import sentencepiece
from data_samples import TEXTS, VOCAB_SIZE, small_tokenizer, write_jsonl

from megatron_completedp.data.readers import read_texts
from megatron_completedp.data.sources import Source, find_files
from megatron_completedp.data.tokenizer import load_tokenizer, train_sentencepiece
from megatron_completedp.errors import DataError


@pytest.mark.parametrize(
    "text",
    [
        TEXTS[1],
        "  two spaces\tand a tab\r\n\n\n    end  ",
        "e\u0301 and \ufb01 are not normalized, \u4e2d and \U0001f600 are bytes",
        "a literal </s>, <s>, <unk> and <0x0A> stay text",
        "",
    ],
)
def test_decoding_gives_the_text_back(tmp_path: Path, text: str) -> None:
    tokenizer = small_tokenizer(tmp_path)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eod not in ids
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_interface_of_a_trained_model(tmp_path: Path) -> None:
    tokenizer = small_tokenizer(tmp_path)
    assert tokenizer.vocab_size == VOCAB_SIZE
    assert tokenizer.eod == 2
    assert tokenizer.pad == -1
    assert tokenizer.decode([tokenizer.eod]) == ""
    assert tokenizer.control_literals == ("<unk>", "<s>", "</s>")
    assert tokenizer.reference_library == f"sentencepiece {sentencepiece.__version__}"
    assert len(tokenizer.encode("the fox")) < len("the fox"), "merges were learned"
    # megatron-core hashes these as JSON to name its index cache.
    assert json.loads(json.dumps(tokenizer.unique_identifiers))["sha256"] == tokenizer.sha256


def test_training_depends_on_the_text_alone(tmp_path: Path) -> None:
    here, there = tmp_path / "a", tmp_path / "somewhere" / "else"
    for folder in (here, there):
        folder.mkdir(parents=True)
    first, second = small_tokenizer(here), small_tokenizer(there)
    assert first.sha256 == second.sha256
    assert load_tokenizer(here / "tokenizer.model").sha256 == first.sha256
    other = train_sentencepiece(
        [text[::-1] for text in TEXTS], VOCAB_SIZE, tmp_path / "other.model"
    )
    assert other.sha256 != first.sha256


@pytest.mark.parametrize("vocab_size", [100, 100_000])
def test_a_vocabulary_that_does_not_fit_the_text(tmp_path: Path, vocab_size: int) -> None:
    with pytest.raises(DataError, match=rf"vocab_size {vocab_size} does not suit"):
        train_sentencepiece(TEXTS, vocab_size, tmp_path / "tokenizer.model")
    assert not (tmp_path / "tokenizer.model").exists()


def test_a_bad_row_is_named_while_training(tmp_path: Path) -> None:
    """The trainer hides errors raised inside the iterator that it reads."""
    corpus = write_jsonl(tmp_path / "corpus.jsonl", TEXTS)
    with corpus.open("a", encoding="utf-8") as stream:
        stream.write('{"text": "torn')
    texts = read_texts(find_files([Source(path=str(corpus))]))
    with pytest.raises(DataError, match=r"corpus\.jsonl:4 \(torn_json"):
        train_sentencepiece(texts, VOCAB_SIZE, tmp_path / "tokenizer.model")


def test_files_that_are_not_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.model does not exist"):
        load_tokenizer(tmp_path / "absent.model")
    empty = tmp_path / "empty.model"
    empty.touch()
    with pytest.raises(DataError, match=r"empty\.model is empty"):
        load_tokenizer(empty)
    small_tokenizer(tmp_path)
    torn = tmp_path / "torn.model"
    torn.write_bytes((tmp_path / "tokenizer.model").read_bytes()[:-7])
    with pytest.raises(DataError, match=r"torn\.model is not a SentencePiece model"):
        load_tokenizer(torn)


def write_tokenizer_json(path: Path, eod: str) -> Path:
    """A word-level tokenizer.json whose largest id is beyond its count of tokens."""
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content = {
        "version": "1.0",
        "added_tokens": [{"id": 0, "content": eod, "special": True, **special}],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {
            "type": "WordLevel",
            "unk_token": "[unk]",
            "vocab": {eod: 0, "[unk]": 1, "fox": 2, "dog": 9},
        },
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_tokenizer_json_without_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    path = write_tokenizer_json(tmp_path / "tokenizer.json", "<|endoftext|>")
    with pytest.raises(DataError, match="pip install tokenizers"):
        load_tokenizer(path)


def test_tokenizer_json(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    path = write_tokenizer_json(tmp_path / "tokenizer.json", "<|endoftext|>")
    tokenizer = load_tokenizer(path)
    assert (tokenizer.vocab_size, tokenizer.eod) == (10, 0)
    assert tokenizer.encode_batch(["fox dog", "dog"]) == [[2, 9], [9]]
    # The library's own rule, under which Megatron's tool works too.
    assert tokenizer.control_literals == ("<|endoftext|>",)
    assert tokenizer.encode("fox <|endoftext|> dog") == [2, tokenizer.eod, 9]
    # Stored by fine-tuning tools; documents must stay whole.
    content = json.loads(path.read_text())
    content["truncation"] = {
        "max_length": 1,
        "stride": 0,
        "strategy": "LongestFirst",
        "direction": "Right",
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    assert load_tokenizer(path).encode("fox dog") == [2, 9]
    with pytest.raises(DataError, match="none of the tokens"):
        load_tokenizer(write_tokenizer_json(path, "<stop>"))
    path.write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"is not a tokenizer\.json"):
        load_tokenizer(path)
