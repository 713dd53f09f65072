"""`python -m megatron_completedp.data`: text to the token files that training reads."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

from megatron_completedp.config.cli import run_command
from megatron_completedp.core.render import text_table
from megatron_completedp.data import preprocess
from megatron_completedp.data.quick import QuickSettings
from megatron_completedp.data.quick import quick as fill_folder
from megatron_completedp.data.readers import read_texts
from megatron_completedp.data.sample_corpus import write_sample_corpus
from megatron_completedp.data.sources import Source, find_files
from megatron_completedp.data.tokenizer import train_sentencepiece

PROG = "python -m megatron_completedp.data"
DESCRIPTION = """\
Turn text into the .bin/.idx token files that training reads. `preprocess` does it for RedPajama and
any JSONL or Parquet, on any number of processes (its own --help; also
tools/preprocess_redpajama.py). `quick` does everything on a small corpus that needs no download.

Examples:
  python -m megatron_completedp.data preprocess --config examples/preprocess/redpajama.yaml
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
    print(text_table(("split", "documents", "MB"), rows, left=None))


def tokenizer(
    inputs: list[str],
    out: Path = Path("data/tokenizer.model"),
    vocab_size: int = QuickSettings.vocab_size,
) -> None:
    """Train a SentencePiece byte-pair tokenizer on the text of files or folders.

    Example: python -m megatron_completedp.data tokenizer --inputs data/jsonl/train

    Args:
        inputs: What `preprocess` takes as sources; leave validation files out. All in memory.
        out: The model file to write.
        vocab_size: Token ids, the 256 bytes and 3 control ids included.
    """
    files = find_files([Source(path=path) for path in inputs])
    model = train_sentencepiece(read_texts(files), vocab_size, out)
    print(f"{out}: {model.vocab_size} ids, end of document {model.eod}, sha256 {model.sha256}")


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
    header = ("data", "documents", "MB", "tokens", "tokens/byte")
    rows = [
        (
            name,
            f"{item.documents:,}",
            f"{item.text_bytes / 1e6:.2f}",
            f"{item.tokens:,}",
            f"{item.tokens_per_byte:.3f}",
        )
        for name, item in fill_folder(out, settings).items()
    ]
    print(text_table(header, rows, left=None))


COMMANDS: dict[str, Callable[..., Any]] = {
    "sample": sample,
    "tokenizer": tokenizer,
    "quick": quick,
}


def main(argv: Sequence[str]) -> int:
    """Run the command that `argv` names. Returns the exit code."""
    if argv[:1] == ["preprocess"]:  # its flags are those of its config, which YAML can give as well
        return preprocess.main(argv[1:])
    tyro.extras.subcommand_cli_from_dict(COMMANDS, prog=PROG, description=DESCRIPTION, args=argv)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
