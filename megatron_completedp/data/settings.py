"""What a preprocessing job is told, in YAML or flags."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from megatron_completedp.config.load import build
from megatron_completedp.data.sources import Source
from megatron_completedp.errors import ConfigError

#: How a finished shard is used, or who makes it: runs that differ only here share a folder.
NOT_THE_SHARDS = ("out", "tokenizer", "workers", "mixture", "weights", "merge")


@dataclass(frozen=True, kw_only=True)
class TrainTokenizer:
    """A SentencePiece byte-pair model to be trained on the first text of every subset."""

    vocab_size: int = 32_000
    """Token ids, the 256 bytes and 3 control ids included."""
    sample_mb: float = 20.0
    """Million bytes of text to train on, in equal shares from the subsets; all in memory."""

    def __post_init__(self) -> None:
        if self.vocab_size < 260:
            raise ConfigError(
                f"train_tokenizer.vocab_size is {self.vocab_size}; expected at least 260, the 256 "
                "bytes, 3 control ids and a piece."
            )
        if not 0 < self.sample_mb < math.inf:
            raise ConfigError(
                f"train_tokenizer.sample_mb is {self.sample_mb}; expected a positive number."
            )


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """One preprocessing job: text files in, one .bin/.idx pair and manifest per file out."""

    sources: tuple[Source, ...]
    """Folders, files, globs or URLs of text; in YAML, mappings with path, format, subset, ..."""
    out: str
    """Folder for <subset>/<file>.{bin,idx,json}, the tokenizer, preprocess.yaml and blend.yaml."""
    tokenizer: str | None = None
    """A SentencePiece .model or a tokenizer.json; a copy is kept in the output folder."""
    train_tokenizer: TrainTokenizer | None = None
    """Instead of a tokenizer: train one on the sources and keep it in the output folder."""
    engine: Literal["auto", "reference"] = "auto"
    """auto uses gigatoken where its ids are sure to be the reference library's; reference never."""
    workers: int | None = None
    """Processes on this machine; none means one per CPU this process may use."""
    max_bad_fraction: float = 0.01
    """Share of a file's rows that may be torn, without text or not UTF-8 before it is refused."""
    mixture: Literal["tokens", "redpajama"] = "tokens"
    """Share of each subset in blend.yaml: by its tokens, or as published for RedPajama-1T."""
    weights: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    """Any other mixture: the weight of each subset, instead of `mixture`."""
    merge: Literal["none", "subset", "all"] = "none"
    """Also write merged/<subset> or merged/all, one pair instead of one per file."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("sources is empty; name at least one folder, file or URL of text.")
        if (self.tokenizer is None) == (self.train_tokenizer is None):
            given = "neither is" if self.tokenizer is None else "both are"
            raise ConfigError(
                f"expected a tokenizer or a train_tokenizer section and {given} given; "
                "give exactly one of them."
            )
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"workers is {self.workers}; expected at least 1.")
        if not 0 <= self.max_bad_fraction < 1:
            raise ConfigError(
                f"max_bad_fraction is {self.max_bad_fraction}; expected a share from 0 to below 1."
            )
        if self.weights and self.mixture != "tokens":
            raise ConfigError(
                f"mixture is {self.mixture} and weights are given as well; give one of them."
            )
        if self.merge == "all" and (self.weights or self.mixture != "tokens"):
            raise ConfigError(
                "merge is all, which leaves one pair and nothing to mix; merge by subset, or leave "
                "mixture and weights out."
            )
        for subset, weight in self.weights.items():
            if not 0 < weight < math.inf:
                raise ConfigError(
                    f"weights.{subset} is {weight}; expected a positive number. Leave a subset's "
                    "sources out instead of giving it no weight."
                )

    @property
    def processes(self) -> int:
        """Worker processes: as asked, or one per CPU that the scheduler grants this process."""
        return self.workers or len(os.sched_getaffinity(0))


def build_preprocess(tree: Mapping[str, Any]) -> PreprocessConfig:
    """The job that the plain `tree` describes; a source that is bare text is its path.

    Raises ConfigError naming the key at fault.
    """
    sources = tree.get("sources")
    if isinstance(sources, list | tuple):
        named = [{"path": item} if isinstance(item, str) else item for item in sources]
        tree = {**tree, "sources": named}
    return build(PreprocessConfig, tree)
