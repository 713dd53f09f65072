"""Merged pairs: the same bytes as if their documents had been written as one pair."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_samples import TEXTS, VOCAB_SIZE, small_tokenizer
from pair_samples import write_pair

from megatron_completedp.data import merge
from megatron_completedp.data.indexed import bin_path, idx_path
from megatron_completedp.data.manifest import load_manifest, manifest_path
from megatron_completedp.data.merge import merge_pairs
from megatron_completedp.data.tokenizer import Tokenizer, train_sentencepiece
from megatron_completedp.errors import DataError


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return small_tokenizer(tmp_path)


@pytest.fixture
def parts(tmp_path: Path, tokenizer: Tokenizer) -> list[Path]:
    """Pairs of 7, 1 and 12 documents, one of them with a row left out."""
    texts = [f"{TEXTS[i % 3]} {i}" for i in range(20)]
    groups = {"a": texts[:7], "b": ["", *texts[7:8]], "c": texts[8:]}
    for name, group in groups.items():
        write_pair(tmp_path / name, group, tokenizer)
    write_pair(tmp_path / "whole", texts, tokenizer)
    return [tmp_path / name for name in groups]


# 1 token: every document is a chunk; 300: several in one, and a rest; the default: all in one.
@pytest.mark.parametrize("chunk_tokens", [1, 300, merge.CHUNK_TOKENS])
def test_the_bytes_of_one_pair_with_all_documents(
    tmp_path: Path, parts: list[Path], monkeypatch: pytest.MonkeyPatch, chunk_tokens: int
) -> None:
    monkeypatch.setattr(merge, "CHUNK_TOKENS", chunk_tokens)
    merged = merge_pairs(parts, tmp_path / "merged")
    for path in (bin_path, idx_path):
        assert path(tmp_path / "merged").read_bytes() == path(tmp_path / "whole").read_bytes()
    whole = load_manifest(tmp_path / "whole")
    assert merged == load_manifest(tmp_path / "merged")
    assert merged.files == whole.files
    assert (merged.documents, merged.tokens, merged.text_bytes) == (
        20,
        whole.tokens,
        whole.text_bytes,
    )
    assert merged.max_token_id == whole.max_token_id
    assert merged.skipped == {"empty_text": 1}
    assert [Path(item.url).name for item in merged.inputs] == ["a.jsonl", "b.jsonl", "c.jsonl"]


def test_merged_again_only_when_something_changed(
    tmp_path: Path, parts: list[Path], tokenizer: Tokenizer
) -> None:
    target = tmp_path / "merged"

    def written() -> int:
        merge_pairs(parts, target)
        return bin_path(target).stat().st_ino  # a new file is renamed into place

    first = written()
    assert written() == first
    idx_path(target).write_bytes(idx_path(target).read_bytes()[:-1])
    second = written()
    assert second != first
    write_pair(parts[1], [TEXTS[0][::-1]], tokenizer)
    assert written() != second
    assert load_manifest(target).documents == 20


def test_order_is_kept(tmp_path: Path, parts: list[Path]) -> None:
    """The control of the comparison above: other orders give other bytes."""
    merge_pairs(parts[::-1], tmp_path / "merged")
    assert bin_path(tmp_path / "merged").read_bytes() != bin_path(tmp_path / "whole").read_bytes()


def test_two_tokenizers_do_not_merge(tmp_path: Path, parts: list[Path]) -> None:
    texts = [text[::-1] for text in TEXTS]
    other = train_sentencepiece(texts, VOCAB_SIZE, tmp_path / "other.model")
    write_pair(tmp_path / "d", TEXTS, other)
    with pytest.raises(DataError, match=f"d.json: made with a tokenizer of sha256 {other.sha256}"):
        merge_pairs([*parts, tmp_path / "d"], tmp_path / "merged")
    assert not manifest_path(tmp_path / "merged").exists()


def test_a_part_that_was_cut(tmp_path: Path, parts: list[Path]) -> None:
    bin_path(parts[2]).write_bytes(bin_path(parts[2]).read_bytes()[:-2])
    with pytest.raises(DataError, match=r"c\.bin"):
        merge_pairs(parts, tmp_path / "merged")
