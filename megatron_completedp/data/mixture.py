"""The share of each subset in training: ready-made for RedPajama, by tokens, or as given.

A subset's share is divided among its pairs in proportion to their tokens, so that every token of a
subset is as likely as any other.
"""

from __future__ import annotations

import difflib
import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import yaml

from megatron_completedp.data.atomic import atomic_write
from megatron_completedp.data.settings import PreprocessConfig
from megatron_completedp.errors import ConfigError

logger = logging.getLogger(__name__)

#: Percent of RedPajama-1T's tokens under the GPT-NeoX tokenizer, as published with the data set.
REDPAJAMA_SHARES: Mapping[str, float] = MappingProxyType(
    {
        "common_crawl": 72.56,
        "c4": 14.46,
        "github": 4.88,
        "arxiv": 2.31,
        "book": 2.15,
        "wikipedia": 1.98,
        "stackexchange": 1.65,
    }
)


class Pair(NamedTuple):
    """A finished .bin/.idx pair as an element of a blend."""

    prefix: Path
    subset: str
    tokens: int


def subset_weights(config: PreprocessConfig, subsets: Collection[str]) -> dict[str, float] | None:
    """The weight of each of `subsets` as `config` says; None where their tokens decide.

    Published shares of subsets that are not there are left out, and said so. Raises ConfigError
    for a subset without a weight and for a weight without a subset; call it before the hours of
    work that it would otherwise spoil.
    """
    if config.weights:
        unknown = [name for name in config.weights if name not in subsets]
        if unknown:
            near = difflib.get_close_matches(unknown[0], list(subsets))
            raise ConfigError(
                f"weights.{unknown[0]}: the sources hold no such subset; "
                f"{f'did you mean {near[0]}' if near else f'they hold {_names(subsets)}'}?"
            )
        weights = config.weights
    elif config.mixture == "redpajama":
        weights = REDPAJAMA_SHARES
        absent = [name for name in weights if name not in subsets]
        if absent:
            logger.warning(
                "the RedPajama mixture without %s: the other shares grow in proportion",
                _names(absent),
            )
    else:
        return None
    missing = [name for name in subsets if name not in weights]
    if missing:
        raise ConfigError(
            f"the subset {missing[0]} has no weight in the mixture of {_names(weights)}; give all "
            "of them in `weights`, name the source's `subset`, or leave the source out."
        )
    return {name: weights[name] for name in subsets}


def blend_weights(pairs: Sequence[Pair], by_subset: Mapping[str, float] | None) -> list[float]:
    """The weight of each pair; they sum to 1. `by_subset` None: in proportion to tokens."""
    tokens: Counter[str] = Counter()
    for pair in pairs:
        tokens[pair.subset] += pair.tokens
    shares = by_subset or tokens
    total = sum(shares[subset] for subset in tokens)
    return [shares[pair.subset] / total * pair.tokens / tokens[pair.subset] for pair in pairs]


def write_blend(
    path: Path, pairs: Sequence[Pair], weights: Sequence[float], tokenizer: Path
) -> None:
    """Write the `data:` section of a run that trains on `pairs` with `weights`."""
    section = {
        "train": [str(pair.prefix) for pair in pairs],
        "train_weights": list(weights),
        "tokenizer": str(tokenizer),
    }
    with atomic_write(path) as stream:
        stream.write(b"# Part of a run's YAML. Move whole prefixes to `valid:` to hold them out.\n")
        stream.write(yaml.safe_dump({"data": section}, sort_keys=False).encode())


def _names(names: Collection[str]) -> str:
    return ", ".join(sorted(names))
