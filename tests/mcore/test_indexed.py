"""Our token files and tokenizer against megatron-core's own writer and readers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_completedp.data.encoder import Encoder
from megatron_completedp.data.indexed import bin_path, check_pair, idx_path
from megatron_completedp.data.indexed_writer import open_indexed
from megatron_completedp.data.shard import write_shard
from megatron_completedp.data.sources import Source, find_files
from megatron_completedp.data.tokenizer import train_sentencepiece


def documents(vocab_size: int) -> list[list[int]]:
    """40 documents of 1 to 60 ids, the largest id of the vocabulary among them."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 61, size=40)
    return [*(rng.integers(0, vocab_size, size=size).tolist() for size in sizes), [vocab_size - 1]]


@pytest.mark.parametrize("vocab_size", [300, 65_499, 65_500, 128_000])
def test_same_bytes_as_megatrons_builder(tmp_path: Path, vocab_size: int) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    builder = IndexedDatasetBuilder(str(bin_path(theirs)), dtype=DType.optimal_dtype(vocab_size))
    lists = documents(vocab_size)
    with open_indexed(ours, vocab_size) as writer:
        for ids in lists[:10]:
            writer.add_documents(np.array(ids), np.array([len(ids)]))
        rest = np.array([i for ids in lists[10:] for i in ids])
        writer.add_documents(rest, np.array([len(ids) for ids in lists[10:]]))
    for ids in lists:
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(idx_path(theirs)))
    assert bin_path(ours).read_bytes() == bin_path(theirs).read_bytes()
    assert idx_path(ours).read_bytes() == idx_path(theirs).read_bytes()
    assert check_pair(theirs).tokens == sum(map(len, documents(vocab_size)))


def test_a_whole_shard_has_the_bytes_of_megatrons_builder(tmp_path: Path) -> None:
    """As Megatron's tool works: json, the tokenizer's own library, one document at a time."""
    texts = [
        "a ladder of widths",
        "caf\u00e9 </s> and <s>",
        "\0 tab\t",
        "e\u0301\n\n\U0001f600",
    ] * 30
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = train_sentencepiece(texts, 290, tmp_path / "tokenizer.model")
    (file,) = find_files([Source(path=str(corpus))])
    write_shard(file, tmp_path / "ours", Encoder(tokenizer), max_bad_fraction=0.0)
    theirs = tmp_path / "theirs"
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builder = IndexedDatasetBuilder(str(bin_path(theirs)), dtype=dtype)
    for text in texts:
        ids = [*tokenizer.encode(text), tokenizer.eod]
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(idx_path(theirs)))
    for path in (bin_path, idx_path):
        assert path(tmp_path / "ours").read_bytes() == path(theirs).read_bytes()


def test_a_document_of_several_sequences_passes_the_check(tmp_path: Path) -> None:
    """Megatron's tool can split documents into sentences; we only read such pairs."""
    builder = IndexedDatasetBuilder(str(tmp_path / "split.bin"), dtype=np.uint16)
    builder.add_document(torch.arange(7), [3, 4])
    builder.add_document(torch.arange(2), [2])
    builder.finalize(str(tmp_path / "split.idx"))
    summary = check_pair(tmp_path / "split")
    assert (summary.documents, summary.sequences, summary.tokens) == (2, 3, 9)


def test_megatrons_dataset_takes_the_pair_and_the_tokenizer(tmp_path: Path) -> None:
    text = "a ladder of widths and depths, one run at every rung"
    tokenizer = train_sentencepiece([text] * 30, 290, tmp_path / "tokenizer.model")
    prefix = tmp_path / "train"
    with open_indexed(prefix, tokenizer.vocab_size) as writer:
        ids = [*tokenizer.encode(text), tokenizer.eod]
        writer.add_documents(np.array(ids * 30), np.array([len(ids)] * 30))
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=16,
        blend=([str(prefix)], None),
        split="1,0,0",
        path_to_cache=str(tmp_path / "cache"),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    train, *_ = BlendedMegatronDatasetBuilder(GPTDataset, [8, 0, 0], lambda: True, config).build()
    stored = IndexedDataset(str(prefix))
    assert len(stored) == 30
    document = stored[0]
    assert tokenizer.decode(document[:-1].tolist()).startswith("a ladder of widths")
    assert document[-1] == tokenizer.eod
    for i in range(8):
        tokens, labels, loss_mask = (train[i][key] for key in ("tokens", "labels", "loss_mask"))
        assert torch.equal(tokens[1:], labels[:-1])
        assert loss_mask.all(), "no token is taken for padding, the end of document included"
