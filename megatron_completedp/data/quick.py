"""Sample corpus, tokenizer and token files in one folder, for the quickstart and for tests."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_completedp.data.atomic import atomic_write
from megatron_completedp.data.indexed import check_pair
from megatron_completedp.data.prepare import PrepareSummary, load_summary, prepare
from megatron_completedp.data.sample_corpus import SPLITS, sample_files, write_sample_corpus
from megatron_completedp.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from megatron_completedp.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class QuickSettings:
    """What the content of a quick folder depends on; kept in its settings.json."""

    max_mb: float = 8.0
    """Million bytes of text in all."""
    valid_mb: float = 0.4
    """Million bytes of text held out for validation."""
    vocab_size: int = 2048
    """Token ids of the tokenizer."""


def quick(
    out: Path, settings: QuickSettings, *, stdlib: Path | None = None
) -> dict[str, PrepareSummary]:
    """Fill OUT with jsonl/, tokenizer.model, train.{bin,idx,json} and valid.{bin,idx,json}.

    Parts that are there and complete stay, so a second call returns at once and a call after an
    interruption finishes the rest. Returns the summary of each split. Raises ConfigError when OUT
    was made with other settings or by another Python version, whose text differs.
    """
    _claim(out, settings)
    files = {split: sample_files(out / "jsonl", split) for split in SPLITS}
    if not all(path.is_file() for paths in files.values() for path in paths):
        write_sample_corpus(
            out / "jsonl", max_mb=settings.max_mb, valid_mb=settings.valid_mb, stdlib=stdlib
        )
    model_path = out / "tokenizer.model"
    tokenizer = (
        load_tokenizer(model_path)
        if model_path.is_file()
        else train_sentencepiece(files["train"], settings.vocab_size, model_path)
    )
    return {
        split: _complete_summary(out / split, tokenizer)
        or prepare(files[split], tokenizer, out / split)
        for split in SPLITS
    }


def _claim(out: Path, settings: QuickSettings) -> None:
    """Write OUT/settings.json, or compare it with `settings` when it is there."""
    path = out / "settings.json"
    wanted = {"python": platform.python_version(), **asdict(settings)}
    if not path.is_file():
        with atomic_write(path) as stream:
            stream.write(json.dumps(wanted, indent=1).encode() + b"\n")
        return
    found = json.loads(path.read_bytes())
    if found != wanted:
        raise ConfigError(
            f"{out} was made with {found}; asked for {wanted}. Choose another --out, or delete "
            f"{out} to make it again."
        )


def _complete_summary(prefix: Path, tokenizer: Tokenizer) -> PrepareSummary | None:
    """The summary of the pair at `prefix` if it is complete and `tokenizer` made it."""
    try:
        pair, summary = check_pair(prefix), load_summary(prefix)
    except DataError:
        return None
    ours = summary.tokenizer_sha256 == tokenizer.sha256 and summary.tokens == pair.tokens
    return summary if ours else None
