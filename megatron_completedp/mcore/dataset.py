"""Indexed datasets as fixed-length samples, through Megatron's blending and shuffling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from megatron_completedp.config.sections import DataConfig


class SampleTokenizer(Protocol):
    """What GPTDataset asks of a tokenizer; `megatron_completedp.data.tokenizer` has it."""

    pad: int
    """An id that no text holds: samples are cut from one long stream and never padded."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def eod(self) -> int:
        """The id that ends a document."""

    @property
    def unique_identifiers(self) -> dict[str, str]:
        """Part of the key under which Megatron caches sample indices."""


def build_datasets(
    data: DataConfig,
    *,
    tokenizer: SampleTokenizer,
    seq_length: int,
    seed: int,
    train_samples: int,
    valid_samples: int,
    cache_dir: str,
) -> tuple[torch.utils.data.Dataset, torch.utils.data.Dataset | None]:
    """The training set and, where `data.valid` names one, the validation set.

    Samples are dicts with `tokens` and `labels`, int64 of shape (seq_length,). All ranks must call
    this together: rank 0 builds the index files in `cache_dir`, the others wait for them.
    """
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend_per_split=[
            _blend(data.train, data.train_weights),
            _blend(data.valid, data.valid_weights),
            None,
        ],
        tokenizer=tokenizer,
        path_to_cache=cache_dir,
        # Documents follow one another in a sample; attention is causal over all of it.
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    sizes = [train_samples, valid_samples if data.valid else None, None]
    builder = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config)
    train, valid, _ = builder.build()
    return train, valid


def _blend(
    prefixes: Sequence[str], weights: Sequence[float]
) -> tuple[list[str], list[float] | None] | None:
    if not prefixes:
        return None
    return list(prefixes), list(weights) or None
