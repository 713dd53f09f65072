"""What a run's data is held to before its first step, and what the run will read of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from megatron_completedp.config.run import RunConfig
from megatron_completedp.core.render import text_table
from megatron_completedp.data.indexed import check_pair
from megatron_completedp.data.manifest import manifest_path, verify_shard
from megatron_completedp.data.tokenizer import Tokenizer, load_tokenizer
from megatron_completedp.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

#: Pairs in the log of the blend; a run on all of RedPajama has 2,084.
MAX_ROWS = 40


def check_data(config: RunConfig, *, rank: int = 0, world_size: int = 1) -> Tokenizer:
    """Verify every .bin/.idx pair and that no token id can exceed the embedding.

    A pair is held to its manifest: sizes, dtype, counts, the hash of the tokenizer and, with
    data.verify_hashes, every byte, which the ranks divide among themselves. A pair without one,
    made by another tool, is checked in itself. Logs the shares of the blend. Raises ConfigError or
    DataError before any model is built; returns the tokenizer.
    """
    tokenizer = _load_tokenizer(config)
    data = config.data
    checked = {}
    for index, prefix in enumerate((*data.train, *data.valid)):
        hashes = data.verify_hashes and index % world_size == rank
        checked[prefix] = _check_prefix(Path(prefix), tokenizer, hashes=hashes)
    tokens = [checked[prefix] for prefix in data.train]
    logger.info("%s", describe_blend(data.train, data.train_weights, tokens, config.train_tokens))
    held_out = sum(checked[prefix] for prefix in data.valid)
    needed = config.evaluation.samples * config.model.seq_length + 1
    if config.evaluation.interval and held_out < needed:
        raise DataError(
            f"the validation data has {held_out:,} tokens; evaluation.samples = "
            f"{config.evaluation.samples} sequences of {config.model.seq_length} need {needed:,}. "
            "Use fewer samples or more text."
        )
    return tokenizer


def describe_blend(
    prefixes: Sequence[str], weights: Sequence[float], tokens: Sequence[int], train_tokens: int
) -> str:
    """A table of what a run of `train_tokens` reads of each pair; no weights: by their tokens."""
    weights = weights or tokens
    shares = [weight / sum(weights) for weight in weights]
    rows = [
        (
            f"{count:,}",
            f"{count / sum(tokens):.4f}",
            f"{share:.4f}",
            f"{share * train_tokens / count:.3f}",
            prefix,
        )
        for share, count, prefix in sorted(
            zip(shares, tokens, prefixes, strict=True), key=lambda row: -row[0]
        )
    ]
    more = f"\nand {len(rows) - MAX_ROWS} more pairs" if len(rows) > MAX_ROWS else ""
    return (
        f"{sum(tokens):,} training tokens on disk; the run reads {train_tokens:,}, "
        f"{train_tokens / sum(tokens):.2f} times that\n"
        + text_table(
            ("tokens", "of all", "of the run", "epochs", "pair"), rows[:MAX_ROWS], left=None
        )
        + more
    )


def _load_tokenizer(config: RunConfig) -> Tokenizer:
    """The tokenizer that `config` names, after checking that the config is complete."""
    data, model = config.data, config.model
    if not data.train:
        raise ConfigError("data.train is empty; name at least one prefix of a .bin/.idx pair.")
    if config.evaluation.interval and not data.valid:
        raise ConfigError(
            "data.valid is empty but evaluation.interval is "
            f"{config.evaluation.interval}; name a validation prefix, or set the interval to 0."
        )
    if data.tokenizer is None:
        raise ConfigError(
            "data.tokenizer is missing; name the tokenizer the data was made with, so that its "
            "ids can be checked against model.vocab_size."
        )
    tokenizer = load_tokenizer(Path(data.tokenizer))
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f"data.tokenizer {data.tokenizer} has {tokenizer.vocab_size} ids but model.vocab_size "
            f"is {model.vocab_size}; ids beyond it would have no embedding. Set model.vocab_size "
            f"to {tokenizer.vocab_size}."
        )
    return tokenizer


def _check_prefix(prefix: Path, tokenizer: Tokenizer, *, hashes: bool) -> int:
    """The tokens of the pair at `prefix`, which is complete and made by `tokenizer`."""
    if not manifest_path(prefix).is_file():
        if hashes:
            raise DataError(
                f"{manifest_path(prefix)} does not exist, so data.verify_hashes has no hashes to "
                "compare with; turn it off, or make the pair with tools/preprocess_redpajama.py."
            )
        logger.warning("%s has no manifest: which tokenizer made it is not known", prefix)
        return check_pair(prefix).tokens
    manifest = verify_shard(prefix, hashes=hashes)
    if manifest.tokenizer_sha256 != tokenizer.sha256:
        raise DataError(
            f"{manifest_path(prefix)}: made with a tokenizer of sha256 "
            f"{manifest.tokenizer_sha256}; data.tokenizer {tokenizer.path} has {tokenizer.sha256}. "
            "The same ids mean other text under it; name the tokenizer that made the pair."
        )
    return manifest.tokens
