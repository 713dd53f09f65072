"""Small tokenizers of every kind that the encoder tells apart."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
from data_samples import TEXTS
from fuzz_texts import WORDS

#: English and code, with what makes merges of spaces and digits.
CORPUS = [line for text in TEXTS for line in text.splitlines()] + [" ".join(WORDS), " " * 40] * 3

#: GPT-4's split, as published with it: the other common kind of byte-level BPE.
GPT4_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def sentencepiece_model(path: Path, **options: Any) -> Path:
    """A byte-pair model, lossless but for `options` of the trainer."""
    lossless = {
        "model_type": "bpe",
        "vocab_size": 420,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "num_threads": 1,
        "minloglevel": 2,
    }
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=buffer, **{**lossless, **options}
    )
    path.write_bytes(buffer.getvalue())
    return path


def byte_level_json(path: Path, edit: Callable[[dict[str, Any]], object] | None = None) -> Path:
    """A byte-level BPE tokenizer.json, NFC, with runs of spaces as added tokens, after `edit`."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken(" " * count, normalized=True) for count in (24, 8, 4, 2)])
    content = json.loads(tokenizer.to_str())
    if edit:
        edit(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def without_normalizer(content: dict[str, Any]) -> None:
    """As GPT-2 has it."""
    content["normalizer"] = None


def split_like_gpt4(content: dict[str, Any]) -> None:
    """Another split into words, and no normalizer."""
    split = {"type": "Split", "pattern": {"Regex": GPT4_SPLIT}, "behavior": "Isolated"}
    byte_level = {**content["pre_tokenizer"], "use_regex": False}
    pre_tokenizers = [{**split, "invert": False}, byte_level]
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": pre_tokenizers}
    content["normalizer"] = None
