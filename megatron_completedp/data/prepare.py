"""JSONL text to one indexed dataset, and the summary that says what went in."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from megatron_completedp.data.atomic import atomic_write
from megatron_completedp.data.indexed import open_indexed
from megatron_completedp.data.jsonl import read_texts
from megatron_completedp.data.tokenizer import Tokenizer
from megatron_completedp.errors import DataError

#: Documents handed to the tokenizer at once: enough to hide the call, little memory.
BATCH_DOCUMENTS = 256


@dataclass(frozen=True, kw_only=True)
class PrepareSummary:
    """What `prepare` read and wrote; stored as PREFIX.json beside the pair."""

    documents: int
    """Documents written."""
    empty_documents: int
    """Rows left out because their text was empty."""
    text_bytes: int
    """UTF-8 bytes of the texts written."""
    tokens: int
    """Token ids written, one end-of-document id per document included."""
    max_token_id: int
    """Largest id written."""
    vocab_size: int
    """Ids the tokenizer can produce; the model's vocab_size."""
    dtype: str
    """How the ids are stored: uint16 or int32."""
    tokenizer_sha256: str
    """Which tokenizer file made the ids."""

    @property
    def tokens_per_byte(self) -> float:
        """Tokens per UTF-8 byte of text: turns nats per token into bits per byte."""
        return self.tokens / self.text_bytes


def summary_path(prefix: Path) -> Path:
    """PREFIX.json."""
    return prefix.with_name(prefix.name + ".json")


def prepare(inputs: Sequence[Path], tokenizer: Tokenizer, prefix: Path) -> PrepareSummary:
    """Tokenize the `text` of JSONL `inputs`, in order, into PREFIX.bin and PREFIX.idx.

    Each document is its ids and `tokenizer.eod`; rows with an empty text are left out and counted.
    Ends by writing the summary to PREFIX.json, so that where it exists the pair is complete too.
    Shows a progress bar on a terminal. Raises DataError for a bad row, with file and line, and
    leaves the pair as it was.
    """
    if not inputs:
        raise DataError(f"no input files for {prefix}; expected at least one JSONL file.")
    summary_path(prefix).unlink(missing_ok=True)
    text_bytes = empty = 0
    with open_indexed(prefix, tokenizer.vocab_size) as writer:
        for batch in _batches(inputs):
            texts = [text for text in batch if text]
            empty += len(batch) - len(texts)
            text_bytes += sum(len(text.encode()) for text in texts)
            for ids in tokenizer.encode_batch(texts):
                writer.add_document([*ids, tokenizer.eod])
    summary = PrepareSummary(
        documents=len(writer.lengths),
        empty_documents=empty,
        text_bytes=text_bytes,
        tokens=writer.tokens,
        max_token_id=writer.max_token_id,
        vocab_size=tokenizer.vocab_size,
        dtype=writer.dtype.name,
        tokenizer_sha256=tokenizer.sha256,
    )
    with atomic_write(summary_path(prefix)) as stream:
        stream.write(json.dumps(asdict(summary), indent=1).encode() + b"\n")
    return summary


def load_summary(prefix: Path) -> PrepareSummary:
    """Read PREFIX.json; DataError when it is missing or not a summary."""
    path = summary_path(prefix)
    try:
        return PrepareSummary(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{path} is not the summary of a data pair ({error}); rebuild the pair with "
            "`python -m megatron_completedp.data prepare`."
        ) from error


def _batches(inputs: Sequence[Path]) -> Iterator[list[str]]:
    """Texts of all inputs in order, BATCH_DOCUMENTS at a time, with a progress bar."""
    batch: list[str] = []
    # disable=None: a bar on a terminal, nothing in a log file.
    with tqdm(unit=" documents", disable=None) as bar:
        for path in inputs:
            bar.set_description(path.name)
            for text in read_texts(path):
                batch.append(text)
                if len(batch) == BATCH_DOCUMENTS:
                    yield batch
                    bar.update(len(batch))
                    batch = []
        yield batch
        bar.update(len(batch))
