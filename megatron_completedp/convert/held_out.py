"""The text that a conversion is proved on, cut into sequences of the model's length."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_completedp.convert.source import Source
from megatron_completedp.data.indexed import open_pair
from megatron_completedp.data.readers import read_texts
from megatron_completedp.data.sources import Source as TextSource
from megatron_completedp.data.sources import find_files
from megatron_completedp.data.tokenizer import Tokenizer
from megatron_completedp.errors import ConversionError

#: Of the first sequence, for a continuation; a text must be longer.
PROMPT_TOKENS = 16


def held_out_texts(source: Source, tokenizer: Tokenizer, text: str | None) -> Iterator[str]:
    """The documents of the file or folder `text`, else of the run's validation data.

    Raises ConversionError when there is neither.
    """
    if text is not None:
        if not Path(text).exists():
            raise ConversionError(f"--text {text} does not exist; give a file or folder of text.")
        return _given_texts(Path(text))
    prefixes = source.config.data.valid if source.config else ()
    if not prefixes:
        raise ConversionError(
            f"{source.checkpoint} names no validation data to compare the models on; give a file "
            "of real text with --text, or --no-verify."
        )
    return _documents(Path(prefixes[0]), tokenizer)


def cut_windows(
    texts: Iterator[str], tokenizer: Tokenizer, *, length: int, count: int
) -> tuple[list[Tensor], list[str]]:
    """`count` sequences, int64 [1, length] each, packed as for training; and the texts in them.

    Raises ConversionError when there is too little text, and for a count below 1.
    """
    if count < 1:
        raise ConversionError(f"--samples is {count}; expected at least 1.")
    ids: list[int] = []
    used = []
    for text in texts:
        used.append(text)
        ids += [*tokenizer.encode(text), tokenizer.eod]
        if len(ids) >= count * length:
            break
    # A short text makes one short sequence.
    whole = max(1, len(ids) // length)
    windows = [ids[i * length : (i + 1) * length] for i in range(min(count, whole))]
    if len(windows[0]) <= PROMPT_TOKENS:
        raise ConversionError(
            f"the text has {len(ids)} tokens; expected more than {PROMPT_TOKENS}. Give a longer "
            "one with --text."
        )
    return [torch.tensor([window]) for window in windows], used


def _given_texts(path: Path) -> Iterator[str]:
    """A .txt file, or each of a folder's, as one document; where there is none, other formats."""
    plain = [path] if path.suffix == ".txt" else sorted(path.rglob("*.txt"))
    if not plain:
        yield from read_texts(find_files([TextSource(path=str(path))]))
    for file in plain:
        try:
            yield file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConversionError(
                f"--text {file} cannot be read as UTF-8 ({error}); convert it, for example with "
                "iconv, or give another file."
            ) from error


def _documents(prefix: Path, tokenizer: Tokenizer) -> Iterator[str]:
    ids, lengths = open_pair(prefix)
    start = 0
    for length in lengths.tolist():
        yield tokenizer.decode(ids[start : start + length - 1].tolist())
        start += length
