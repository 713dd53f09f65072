"""Text and seeds that no trial had: what is reported is measured on those alone."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

import optuna

from megatron_completedp.config.recipe import Provenance
from megatron_completedp.config.run import RunConfig
from megatron_completedp.config.sections import DataConfig
from megatron_completedp.data.manifest import text_hashes
from megatron_completedp.errors import ConfigError
from megatron_completedp.search.attributes import IDENTITY, replicate_of


def check_heldout(data: DataConfig, heldout: Sequence[str]) -> None:
    """Raise ConfigError for a prefix in `heldout` that runs on `data` train on or are chosen by.

    By its path, and by its content where both have a manifest.
    """
    used = (*data.train, *data.valid)
    paths, hashes = {os.path.realpath(prefix) for prefix in used}, text_hashes(used).values()
    own = text_hashes(heldout)
    if both := [p for p in heldout if os.path.realpath(p) in paths or own.get(p) in hashes]:
        raise ConfigError(
            f"heldout has {', '.join(both)}, whose tokens data.train or data.valid of the run has "
            "too: losses on what trials are trained on or chosen by are too low. Use another split."
        )


def check_unseen(provenance: Provenance, heldout: Sequence[str], recipe: str) -> None:
    """Raise ConfigError for `heldout` text that the search behind the recipe had, by its hashes."""
    searched = {sha256: prefix for prefix, sha256 in provenance.data.items()}
    for prefix, sha256 in text_hashes(heldout).items():
        if sha256 in searched:
            raise ConfigError(
                f"heldout has {prefix}, the tokens that the search behind {recipe} trained on or "
                f"chose by as {searched[sha256]}: losses on them are too low. Use another split."
            )


def on_heldout(base: RunConfig, heldout: tuple[str, ...]) -> RunConfig:
    """`base`, evaluated on the token files `heldout`. Raises ConfigError like `check_heldout`."""
    check_heldout(base.data, heldout)
    return replace(base, data=replace(base.data, valid=heldout, valid_weights=()))


def text_of(config: RunConfig) -> dict[str, str]:
    """Hashes of the token files that a run trains on and is evaluated on, as far as they exist."""
    return text_hashes((*config.data.train, *config.data.valid))


def seeds_of(first: int, seeds: int, replicate: int) -> range:
    """The `seeds` seeds of a point's run number `replicate`, in a search from the seed `first`."""
    start = first + replicate * seeds
    return range(start, start + seeds)


def every_seed(study: optuna.Study, first: int) -> set[int]:
    """Every seed that a trial of `study` had, whose seeds begin with `first`."""
    seeds = study.user_attrs[IDENTITY]["seeds"]
    replicates = {replicate_of(trial) for trial in study.get_trials(deepcopy=False)}
    return {seed for each in replicates for seed in seeds_of(first, seeds, each)}


def check_seeds(fresh: Iterable[int], had: Collection[int]) -> None:
    """Raise ConfigError for a seed in `fresh` that a trial had."""
    if both := sorted(set(fresh) & set(had)):
        raise ConfigError(
            f"seeds has {', '.join(map(str, both))}, which trials of the studies had: their points "
            f"were chosen by them. Use others, such as those from {max(had) + 1} on."
        )
