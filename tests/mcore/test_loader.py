"""Every layout reads the same global batches, and a resumed run reads on where it stopped."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import Dataset

from megatron_completedp.train.loader import Batch, Share, steps_of_batches

GLOBAL = 24
LAYOUTS = [
    (micro, ranks)
    for micro in (1, 2, 3, 8)
    for ranks in (1, 2, 3, 4)
    if GLOBAL % (micro * ranks) == 0
]


class Counting(Dataset[Batch]):
    """Sample i is [i, i + 1] with labels [-i, -i - 1]."""

    def __len__(self) -> int:
        return 10 * GLOBAL

    def __getitem__(self, index: int) -> Batch:
        tokens = torch.tensor([index, index + 1])
        return {"tokens": tokens, "labels": -tokens, "loss_mask": tokens}


def share(micro: int, rank: int, ranks: int) -> Share:
    return Share(global_batch_size=GLOBAL, micro_batch_size=micro, dp_rank=rank, dp_size=ranks)


@pytest.mark.parametrize(("micro", "ranks"), LAYOUTS)
@pytest.mark.parametrize("step", [0, 1, 7])
def test_a_global_batch_is_the_same_set_in_every_layout(micro: int, ranks: int, step: int) -> None:
    everyone = [share(micro, rank, ranks).indices(step) for rank in range(ranks)]
    for mine in everyone:
        assert len(mine) == GLOBAL // (micro * ranks)
        assert all(len(batch) == micro for batch in mine)
    seen = sorted(index for mine in everyone for batch in mine for index in batch)
    assert seen == list(range(step * GLOBAL, (step + 1) * GLOBAL))


def test_batches_hold_the_samples_of_their_step() -> None:
    mine = share(micro=4, rank=1, ranks=2)
    steps = list(steps_of_batches(Counting(), mine, first_step=0, steps=5, workers=0))
    assert len(steps) == 5
    for step, batches in enumerate(steps):
        got = [batch["tokens"][:, 0].tolist() for batch in batches]
        assert got == mine.indices(step)
        assert all(set(batch) == {"tokens", "labels"} for batch in batches)
        assert all(torch.equal(batch["labels"], -batch["tokens"]) for batch in batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_reads_what_the_whole_one_would(workers: int) -> None:
    mine = share(micro=3, rank=0, ranks=2)
    whole = list(steps_of_batches(Counting(), mine, first_step=0, steps=6, workers=0))
    rest = list(steps_of_batches(Counting(), mine, first_step=4, steps=6, workers=workers))
    assert len(rest) == 2
    for step, resumed in zip(whole[4:], rest, strict=True):
        for one, other in zip(step, resumed, strict=True):
            assert torch.equal(one["tokens"], other["tokens"])


def test_reading_draws_nothing_from_the_default_generator() -> None:
    before = torch.get_rng_state()
    mine = share(micro=3, rank=0, ranks=2)
    assert len(list(steps_of_batches(Counting(), mine, first_step=0, steps=2, workers=0))) == 2
    assert torch.equal(torch.get_rng_state(), before)
