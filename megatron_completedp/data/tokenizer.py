"""Tokenizers: train a SentencePiece model, or read one, or read a Hugging Face tokenizer.json.

Both kinds answer to one interface, which also has the attributes that megatron-core's GPTDataset
asks of a tokenizer (`eod`, `pad`, `vocab_size`, `unique_identifiers`).

What a control token spelt inside a document becomes is left to the library, so that the ids are
those of every other tool that uses it: under SentencePiece a literal "</s>" is text, under a
tokenizer.json a literal "<|endoftext|>" is the token's id, and ends a document where none ended.
"""

from __future__ import annotations

import hashlib
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from megatron_completedp.data.atomic import atomic_write
from megatron_completedp.errors import DataError

#: Names under which a tokenizer.json may hold the token that ends a document, in order of trust.
EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


class Tokenizer(ABC):
    """Text to token ids and back; made by `load_tokenizer`."""

    #: Padding id for GPTDataset. Documents are packed, so nothing is padded, and -1 is the value
    #: megatron-core itself uses for "an id that no data holds".
    pad = -1

    def __init__(self, path: Path, content: bytes) -> None:
        self.path = path
        self.content = content
        self.sha256 = hashlib.sha256(content).hexdigest()

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    @abstractmethod
    def eod(self) -> int:
        """The id that ends each document."""

    @property
    @abstractmethod
    def reference_library(self) -> str:
        """The library that encodes, and its version."""

    @property
    @abstractmethod
    def control_literals(self) -> tuple[str, ...]:
        """How the tokens are spelt that no text should hold."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, on one thread, without any that mark a beginning or an end."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; ids that mark a beginning or an end give no text."""

    def encode(self, text: str) -> list[int]:
        """The ids of one text."""
        return self.encode_batch([text])[0]

    @property
    def unique_identifiers(self) -> dict[str, str]:
        """Names the vocabulary in megatron-core's index cache; by content, so that a copy hits."""
        return {"class": type(self).__name__, "sha256": self.sha256}


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; the end-of-document id is its `</s>`."""

    def __init__(self, path: Path, content: bytes) -> None:
        super().__init__(path, content)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise DataError(
                f"{path} is not a SentencePiece model; it may be truncated. Train or copy it again."
            ) from error
        if self._model.eos_id() < 0:
            raise DataError(
                f"{path} has no </s> to end a document with; expected a model trained with one, "
                "e.g. by `python -m megatron_completedp.data tokenizer`."
            )

    @property
    def vocab_size(self) -> int:
        """Pieces in the model."""
        return int(self._model.vocab_size())

    @property
    def eod(self) -> int:
        """The id of `</s>`."""
        return int(self._model.eos_id())

    @property
    def reference_library(self) -> str:
        """`sentencepiece` and its version."""
        return f"sentencepiece {sentencepiece.__version__}"

    @property
    def control_literals(self) -> tuple[str, ...]:
        """The control and unknown pieces; a text that spells one stays text."""
        model = self._model
        ids = range(model.vocab_size())
        return tuple(
            model.id_to_piece(i) for i in ids if model.is_control(i) or model.is_unknown(i)
        )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, on one thread, without any that mark a beginning or an end."""
        ids: list[list[int]] = self._model.encode(list(texts), out_type=int, num_threads=1)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`."""
        text: str = self._model.decode([int(i) for i in ids])
        return text


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json; needs the optional package `tokenizers`."""

    def __init__(self, path: Path, content: bytes) -> None:
        super().__init__(path, content)
        try:
            import tokenizers
        except ImportError as error:
            raise DataError(
                f"{path} is read by the package tokenizers, which is not installed: "
                "pip install tokenizers, or use a SentencePiece .model file."
            ) from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the package raises bare Exception
            raise DataError(
                f"{path} is not a tokenizer.json ({error}). Copy it again from its source."
            ) from error
        # Settings of a fine-tuning tool that may be stored in the file: documents are kept whole.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # One core for each process, as it is for SentencePiece; the library asks at every call.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._version = tokenizers.__version__
        vocab: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        name = next((name for name in EOD_NAMES if name in vocab), None)
        if name is None:
            raise DataError(
                f"{path} has none of the tokens {', '.join(EOD_NAMES)}; expected one to end "
                "documents with. Use a tokenizer made for pretraining text."
            )
        self._eod = vocab[name]
        # Ids may have gaps, so the count of tokens is not the bound.
        self._vocab_size = max(vocab.values()) + 1

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return self._vocab_size

    @property
    def eod(self) -> int:
        """The id of the first of EOD_NAMES that the vocabulary has."""
        return self._eod

    @property
    def reference_library(self) -> str:
        """`tokenizers` and its version."""
        return f"tokenizers {self._version}"

    @property
    def control_literals(self) -> tuple[str, ...]:
        """The added tokens that are marked special; a text that spells one gets its id."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        return tuple(token.content for token in added if token.special)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, on one thread, without any that mark a beginning or an end."""
        # "fast" leaves out the place of each token in the text, and a fifth of the memory.
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`."""
        text: str = self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)
        return text


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in `path`: a tokenizer.json by its suffix, else a SentencePiece model.

    Raises DataError when the file is missing, empty or not what its name says.
    """
    if not path.is_file():
        raise DataError(
            f"tokenizer {path} does not exist; train one with `python -m megatron_completedp.data "
            "tokenizer` or correct the path."
        )
    content = path.read_bytes()
    if not content:
        raise DataError(f"tokenizer {path} is empty; train or copy it again.")
    kind = HuggingFaceTokenizer if path.suffix == ".json" else SentencePieceTokenizer
    return kind(path, content)


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, model_path: Path
) -> SentencePieceTokenizer:
    """Train a byte-pair model on `texts`, all of them in memory, and write it to `model_path`.

    Lossless: no normalization, no added space, unknown characters as bytes. Deterministic: one
    thread, no sampling, and no path in the model, so equal text gives an equal file. Ids 0, 1, 2
    are `<unk>`, `<s>`, `</s>`; 3 to 258 are the bytes. Raises DataError when `vocab_size` does not
    suit the text.
    """
    # Lines, because the trainer skips sentences above 4 kB, which most documents are; a list,
    # because it would swallow an error of ours that is raised while it reads.
    lines = [line for text in texts for line in text.splitlines()]
    buffer = io.BytesIO()
    options: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": vocab_size,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,  # one token for an indentation of code
        "num_threads": 1,
        "minloglevel": 2,
    }
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=buffer, **options
        )
    except RuntimeError as error:
        # What precedes the last bracket is a place in the trainer's source.
        reason = str(error).rpartition("] ")[2].strip()
        raise DataError(
            f"vocab_size {vocab_size} does not suit the {len(lines):,} lines of text: {reason} "
            "Change vocab_size or give more text."
        ) from error
    content = buffer.getvalue()
    with atomic_write(model_path) as stream:
        stream.write(content)
    return SentencePieceTokenizer(model_path, content)
