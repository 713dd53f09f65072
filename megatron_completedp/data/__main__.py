"""`python -m megatron_completedp.data`: text to the token files that training reads."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

from megatron_completedp.config.cli import run_command
from megatron_completedp.data.prepare import PrepareSummary
from megatron_completedp.data.prepare import prepare as prepare_pair
from megatron_completedp.data.quick import QuickSettings
from megatron_completedp.data.quick import quick as fill_folder
from megatron_completedp.data.sample_corpus import write_sample_corpus
from megatron_completedp.data.tokenizer import load_tokenizer, train_sentencepiece

PROG = "python -m megatron_completedp.data"
DESCRIPTION = """\
Turn JSONL text into the .bin/.idx token files that training reads. `quick` does everything on a
small corpus that needs no download.

Example:
  python -m megatron_completedp.data quick --out data
"""


def sample(
    out: Path = Path("data/jsonl"),
    max_mb: float = QuickSettings.max_mb,
    valid_mb: float = QuickSettings.valid_mb,
) -> None:
    """Write the text of this Python installation as RedPajama-shaped JSONL (PSF licence).

    Example: python -m megatron_completedp.data sample --out data/jsonl --max-mb 4

    Args:
        out: Folder for train/ and valid/, each with c4/ and github/.
        max_mb: At most this many million bytes of text in all.
        valid_mb: At most this many million bytes of it are held out for validation.
    """
    splits = write_sample_corpus(out, max_mb=max_mb, valid_mb=valid_mb)
    rows = [
        (name, f"{split.documents:,}", f"{split.text_bytes / 1e6:.2f}")
        for name, split in splits.items()
    ]
    _print_table(("split", "documents", "MB"), rows)


def tokenizer(
    inputs: list[Path],
    out: Path = Path("data/tokenizer.model"),
    vocab_size: int = QuickSettings.vocab_size,
) -> None:
    """Train a SentencePiece byte-pair tokenizer on the text of JSONL files.

    Example: python -m megatron_completedp.data tokenizer --inputs data/jsonl/train/*/*.jsonl

    Args:
        inputs: JSONL files with a "text" in each row; leave validation files out.
        out: The model file to write.
        vocab_size: Token ids, the 256 bytes and 3 control ids included.
    """
    model = train_sentencepiece(inputs, vocab_size, out)
    print(f"{out}: {model.vocab_size} ids, end of document {model.eod}, sha256 {model.sha256}")


def prepare(
    inputs: list[Path],
    prefix: Path = Path("data/train"),
    tokenizer: Path = Path("data/tokenizer.model"),
) -> None:
    """Tokenize JSONL files into PREFIX.bin and PREFIX.idx, which training reads.

    Example: python -m megatron_completedp.data prepare --inputs data/jsonl/train/*/*.jsonl
    --prefix data/train

    Args:
        inputs: JSONL files with a "text" in each row, written in this order.
        prefix: Where to write, without .bin or .idx.
        tokenizer: A SentencePiece .model or a tokenizer.json.
    """
    summary = prepare_pair(inputs, load_tokenizer(tokenizer), prefix)
    _print_summaries({str(prefix): summary})


def quick(
    out: Path = Path("data"),
    max_mb: float = QuickSettings.max_mb,
    valid_mb: float = QuickSettings.valid_mb,
    vocab_size: int = QuickSettings.vocab_size,
) -> None:
    """Make a small corpus, its tokenizer and its token files in one folder; skip what is there.

    Example: python -m megatron_completedp.data quick --out data

    Args:
        out: Folder for jsonl/, tokenizer.model, train.bin, valid.bin and their indexes.
        max_mb: At most this many million bytes of text in all.
        valid_mb: At most this many million bytes of it are held out for validation.
        vocab_size: Token ids, the 256 bytes and 3 control ids included.
    """
    settings = QuickSettings(max_mb=max_mb, valid_mb=valid_mb, vocab_size=vocab_size)
    _print_summaries(fill_folder(out, settings))


def _print_summaries(summaries: dict[str, PrepareSummary]) -> None:
    header = ("data", "documents", "MB", "tokens", "tokens/byte")
    rows = [
        (
            name,
            f"{item.documents:,}",
            f"{item.text_bytes / 1e6:.2f}",
            f"{item.tokens:,}",
            f"{item.tokens_per_byte:.3f}",
        )
        for name, item in summaries.items()
    ]
    _print_table(header, rows)


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """First column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *cells]))


COMMANDS: dict[str, Callable[..., Any]] = {
    "sample": sample,
    "tokenizer": tokenizer,
    "prepare": prepare,
    "quick": quick,
}


def main(argv: Sequence[str]) -> int:
    """Run the command that `argv` names. Returns the exit code."""
    tyro.extras.subcommand_cli_from_dict(COMMANDS, prog=PROG, description=DESCRIPTION, args=argv)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
