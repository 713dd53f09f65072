"""Sample corpus, tokenizer and token files in one folder, for the quickstart and for tests."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_completedp.data.atomic import atomic_write
from megatron_completedp.data.encoder import Encoder
from megatron_completedp.data.manifest import ShardManifest
from megatron_completedp.data.merge import merge_pairs
from megatron_completedp.data.readers import read_texts
from megatron_completedp.data.restart import ShardOrder, make_shard
from megatron_completedp.data.sample_corpus import SPLITS, sample_files, write_sample_corpus
from megatron_completedp.data.sources import Source, SourceFile, find_files
from megatron_completedp.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from megatron_completedp.errors import ConfigError


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
) -> dict[str, ShardManifest]:
    """Fill OUT with jsonl/, tokenizer.model, train.{bin,idx,json} and valid.{bin,idx,json}.

    pairs/ holds the pair of each JSONL file, which the two are merged from. Parts that are there
    and complete stay, so a second call returns soon and a call after an interruption finishes the
    rest. Returns the manifest of each split. Raises ConfigError when OUT was made with other
    settings or by another Python version, whose text differs.
    """
    _claim(out, settings)
    paths = [path for split in SPLITS for path in sample_files(out / "jsonl", split)]
    if not all(path.is_file() for path in paths):
        write_sample_corpus(
            out / "jsonl", max_mb=settings.max_mb, valid_mb=settings.valid_mb, stdlib=stdlib
        )
    files = {split: find_files([Source(path=str(out / "jsonl" / split))]) for split in SPLITS}
    model_path = out / "tokenizer.model"
    tokenizer = (
        load_tokenizer(model_path)
        if model_path.is_file()
        else train_sentencepiece(read_texts(files["train"]), settings.vocab_size, model_path)
    )
    encoder = Encoder(tokenizer)
    return {split: _make_split(out, split, files[split], encoder, tokenizer) for split in SPLITS}


def _make_split(
    out: Path, split: str, files: Sequence[SourceFile], encoder: Encoder, tokenizer: Tokenizer
) -> ShardManifest:
    order = ShardOrder(
        out=out / "pairs" / split,
        tokenizer=tokenizer.path,
        tokenizer_sha256=tokenizer.sha256,
        engine="auto",
        max_bad_fraction=0.0,
    )
    for file in files:
        make_shard(order, file, encoder, wait=True)
    return merge_pairs([order.prefix(file) for file in files], out / split)


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
