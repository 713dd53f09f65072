"""Texts to token ids: by gigatoken where it can be trusted, else by the tokenizer's own library.

The own library, `tokenizers` or `sentencepiece`, is the reference: the ids are its ids, whichever
engine encodes. fast_engine.py says what gigatoken may encode; what it does encode is held to the
reference by a sample, for which documents are chosen by their place in the shard alone, so that the
outcome does not depend on workers or interruptions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_completedp.data.fast_engine import (
    Utf8Texts,
    find_literals,
    load_fast_engine,
    same_ids,
)
from megatron_completedp.data.tokenizer import Tokenizer
from megatron_completedp.errors import CompletedPError

#: The first document to begin after each such stretch of text, the very first one included, is
#: compared: its first SAMPLE_CHARS characters. 0.02 % of the text takes 2 % of the time.
SAMPLE_EVERY_BYTES = 4 << 20
SAMPLE_CHARS = 1024

#: Text that the reference gets at once: `tokenizers` takes 130 bytes of memory for each of it.
REFERENCE_CHARS = 1 << 20


class EnginesDisagree(CompletedPError):
    """The two engines encoded the head of a sampled document differently."""

    def __init__(self, document: int) -> None:
        super().__init__(f"the engines encode document {document} differently.")
        self.document = document
        """Its number in the shard."""


@dataclass
class EncodeCounts:
    """What has been encoded of a shard; `Encoder.encode` adds to it."""

    documents: int = 0
    text_bytes: int = 0
    control_literal_documents: int = 0
    reference_documents: int = 0
    compared_documents: int = 0
    last_stretch: int = -1
    """Whole stretches of text before the last document."""


class Encoder:
    """A tokenizer, and the engine that encodes for it."""

    def __init__(
        self, tokenizer: Tokenizer, *, engine: Literal["auto", "reference"] = "auto"
    ) -> None:
        """`auto` is gigatoken wherever it can be trusted; `reference` never uses it."""
        self.tokenizer = tokenizer
        self._fast = load_fast_engine(tokenizer) if engine == "auto" else None
        self.name = self._fast.name if self._fast else tokenizer.reference_library
        """The engine and its version."""
        self._control_literals = find_literals(tokenizer.control_literals)

    def encode(self, texts: Sequence[str], counts: EncodeCounts) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts back to back, `eod` after each, and the length of each with it.

        The ids (uint32) depend on the texts and the tokenizer alone; texts must be valid Unicode.
        `counts` are of the shard that the texts continue. Raises EnginesDisagree when a sampled
        document differs.
        """
        if not texts:
            return np.empty(0, np.uint32), np.empty(0, np.int64)
        batch = Utf8Texts(texts)
        if self._fast is None:
            flat, lengths = self._encode_by_reference(texts)
            counts.reference_documents += len(texts)
        else:
            risky = self._fast.differs.find(batch)
            self._compare_sample(batch, counts)
            flat, lengths = self._fast.encode(batch.data)
            if risky:
                flat, lengths = self._replace(flat, lengths, texts, risky)
            counts.reference_documents += len(risky)
        counts.documents += len(texts)
        counts.text_bytes += len(batch.joined)
        counts.control_literal_documents += len(self._control_literals.find(batch))
        return np.insert(flat, np.cumsum(lengths), self.tokenizer.eod), lengths + 1

    def _encode_by_reference(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts back to back, and the length of each."""
        pieces = [
            np.array(ids, np.uint32)
            for group in _groups(texts)
            for ids in self.tokenizer.encode_batch(group)
        ]
        return np.concatenate(pieces), np.array([piece.size for piece in pieces], np.int64)

    def _replace(
        self, flat: np.ndarray, lengths: np.ndarray, texts: Sequence[str], numbers: list[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """`flat` and `lengths`, with the documents of these numbers encoded by the reference."""
        pieces = np.split(flat, np.cumsum(lengths)[:-1])
        theirs, their_lengths = self._encode_by_reference([texts[i] for i in numbers])
        for i, piece in zip(numbers, np.split(theirs, np.cumsum(their_lengths)[:-1]), strict=True):
            pieces[i] = piece
        return np.concatenate(pieces), np.array([piece.size for piece in pieces], np.int64)

    def _compare_sample(self, batch: Utf8Texts, counts: EncodeCounts) -> None:
        """Encode the heads of the sampled texts by both engines; raises EnginesDisagree."""
        assert self._fast is not None
        starts = counts.text_bytes + np.array([0, *batch.ends[:-1]])
        stretches = starts // SAMPLE_EVERY_BYTES
        for i in np.flatnonzero(np.diff(stretches, prepend=counts.last_stretch)).tolist():
            head = batch.texts[i][:SAMPLE_CHARS]
            if self._fast.differs.find(Utf8Texts([head])):
                continue  # known, and never left to gigatoken
            if not same_ids(self._fast, self.tokenizer, [head]):
                raise EnginesDisagree(counts.documents + i)
            counts.compared_documents += 1
        counts.last_stretch = int(stretches[-1])


def _groups(texts: Sequence[str]) -> Iterator[list[str]]:
    """Texts of REFERENCE_CHARS in all or less, or one that is longer."""
    group: list[str] = []
    size = 0
    for text in texts:
        if group and size + len(text) > REFERENCE_CHARS:
            yield group
            group, size = [], 0
        group.append(text)
        size += len(text)
    yield group
