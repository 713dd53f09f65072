"""The token batches that the checks train on: the run's own text, or seeded synthetic ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from megatron_completedp.config.run import RunConfig
from megatron_completedp.mcore.dataset import build_datasets
from megatron_completedp.mcore.engine import Batch
from megatron_completedp.train.loader import Share
from megatron_completedp.train.start import check_data

#: One sequence of seq_length + 1 ids by its number.
Sequences = Callable[[int], torch.Tensor]

#: Numbers kept for the held-out batch, before those of training.
_HELD_OUT = 1024


class Batches:
    """Micro batches of one run; training never sees the held-out one."""

    def __init__(self, config: RunConfig, sequences: Sequences) -> None:
        self._config = config
        self._sequences = sequences

    def train(self, step: int, dp_rank: int, dp_size: int) -> list[Batch]:
        """The micro batches of one data-parallel rank at `step`."""
        share = Share(
            global_batch_size=self._config.training.global_batch_size,
            micro_batch_size=self._config.training.micro_batch_size,
            dp_rank=dp_rank,
            dp_size=dp_size,
        )
        return [
            self._batch([_HELD_OUT + index for index in indices]) for indices in share.indices(step)
        ]

    def held_out(self, number: int = 0) -> Batch:
        """One micro batch, the same for every batch size and on every rank."""
        size = self._config.training.micro_batch_size
        return self._batch(range(number * size, (number + 1) * size))

    def _batch(self, indices: Sequence[int]) -> Batch:
        ids = torch.stack([self._sequences(index) for index in indices])
        return {"tokens": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}


def token_sequences(config: RunConfig, samples: int, cache: Path) -> Sequences:
    """The sequences of `config`: its training text where it names any, else synthetic ones.

    Text is cut into at least `samples` sequences for training, with an index in `cache`; all ranks
    call this together, with Megatron's groups set up. Raises what `check_data` raises.
    """
    if not config.data.train:
        return partial(synthetic_sequence, config)
    dataset, _ = build_datasets(
        config.data,
        tokenizer=check_data(config),
        seq_length=config.model.seq_length,
        seed=config.seed,
        train_samples=_HELD_OUT + samples,
        valid_samples=0,
        cache_dir=str(cache),
    )

    def sequence(index: int) -> torch.Tensor:
        sample = dataset[index]
        return torch.cat([sample["tokens"], sample["labels"][-1:]])

    return sequence


def synthetic_sequence(config: RunConfig, index: int) -> torch.Tensor:
    """Sequence number `index` >= 0: seq_length + 1 ids with Zipf frequencies and bigrams, int64.

    Each id is, with even odds, the fixed successor of the one before or a new draw from
    p(k) ~ k^-1.5. The frequent ids make updates coherent: what the update for one token does to
    another is then visible over the noise ~ width^-1/2 at widths from 64 on.
    """
    vocab, length = config.model.vocab_size, config.model.seq_length + 1
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + index)
    frequencies = torch.arange(1, vocab + 1.0) ** -1.5
    ids = torch.multinomial(frequencies, length, replacement=True, generator=generator).tolist()
    follows = torch.rand(length, generator=generator) < 0.5
    for place in range(1, length):
        if follows[place]:
            ids[place] = (7 * ids[place - 1] + 3) % vocab
    return torch.tensor(ids)
