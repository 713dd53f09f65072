"""A small pair with its manifest, made by the code that makes real ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_samples import write_jsonl

from megatron_completedp.data.encoder import Encoder
from megatron_completedp.data.manifest import ShardManifest
from megatron_completedp.data.shard import write_shard
from megatron_completedp.data.sources import Source, find_files
from megatron_completedp.data.tokenizer import Tokenizer


def write_pair(prefix: Path, texts: Sequence[str], tokenizer: Tokenizer) -> ShardManifest:
    """The pair at `prefix` of one JSONL file beside it, PREFIX.jsonl, with these texts."""
    path = write_jsonl(prefix.with_name(prefix.name + ".jsonl"), texts)
    (file,) = find_files([Source(path=str(path))])
    return write_shard(file, prefix, Encoder(tokenizer), max_bad_fraction=0.01)
