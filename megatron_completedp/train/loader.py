"""Which samples make which micro batch: a pure function of the step, so that resuming is exact."""

from __future__ import annotations

import atexit
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset

from megatron_completedp.train.signals import ignore_in_worker

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Share:
    """One data-parallel rank's share of every global batch."""

    global_batch_size: int
    """Sequences per optimizer step, over all ranks."""
    micro_batch_size: int
    dp_rank: int
    dp_size: int

    @property
    def micro_batches(self) -> int:
        """Micro batches per step on each rank."""
        return self.global_batch_size // (self.micro_batch_size * self.dp_size)

    def indices(self, step: int) -> list[list[int]]:
        """Sample indices of this rank's micro batches at `step`.

        A global batch is the same set of samples in every layout: micro batch m of rank r holds
        the run of micro_batch_size samples number m * dp_size + r.
        """
        start = step * self.global_batch_size
        runs = (
            start + (micro * self.dp_size + self.dp_rank) * self.micro_batch_size
            for micro in range(self.micro_batches)
        )
        return [list(range(first, first + self.micro_batch_size)) for first in runs]


def steps_of_batches(
    dataset: Dataset[Batch], share: Share, *, first_step: int, steps: int, workers: int
) -> Iterator[list[Batch]]:
    """The micro batches of each step from `first_step` to `steps` - 1.

    `workers` processes read ahead; 0 reads in this one, which is best on CPU.
    """
    order = (batch for step in range(first_step, steps) for batch in share.indices(step))
    loader = DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=workers,
        pin_memory=workers > 0,
        worker_init_fn=ignore_in_worker,
        collate_fn=_collate,
        # Torch draws a seed for workers from it. The default generator belongs to the checkpoint:
        # drawing from it would leave its state to the number of restarts and evaluations.
        generator=torch.Generator(),
    )
    if workers:
        atexit.register(_kill_workers)
    batches = iter(loader)
    for _ in range(first_step, steps):
        yield [next(batches) for _ in range(share.micro_batches)]


def _kill_workers() -> None:
    """For exits that leave the loader open: the workers ignore SIGTERM, which Python would send."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _collate(samples: list[Batch]) -> Batch:
    return {
        name: torch.stack([sample[name] for sample in samples]) for name in ("tokens", "labels")
    }
