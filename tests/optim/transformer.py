"""The tensors of a transformer as Megatron fuses them, each module of each layer a set of its own.

Shared by the optimizer's tests (tiny, odd sizes) and its benchmark (real sizes).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from megatron_completedp.optim.backend import StepInputs
from megatron_completedp.optim.reference import reference_adamw
from megatron_completedp.optim.segments import AdamWValues, Segment, segments_of_shard

Shape = tuple[int, ...]
ShapedSegments = tuple[Shape, tuple[Segment, ...]]


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """Sizes; q, k and v interleave by query group, gate and up lie behind one another."""

    layers: int
    hidden: int
    ffn: int
    groups: int
    """Query groups, each with `queries` heads of q and one of k and v."""
    queries: int
    head_dim: int
    vocab: int

    def tensors(self) -> list[ShapedSegments]:
        """Shape and segments of every tensor; 3 + 11 * layers sets in order of appearance."""
        h, d, heads = self.hidden, self.head_dim, self.groups * self.queries
        plain = [(h,), (d,), (d,), (h, heads * d), (h,), (h, self.ffn)]
        found: list[ShapedSegments] = []
        sets = 0
        for shape in [(self.vocab, h), (h,), (self.vocab, h)]:
            found.append(_one_set(shape, sets))
            sets += 1
        for _ in range(self.layers):
            for shape in plain:
                found.append(_one_set(shape, sets))
                sets += 1
            qkv = [self.queries * d, d, d] * self.groups
            found.append(_by_rows(qkv, [sets, sets + 1, sets + 2] * self.groups, h))
            found.append(_by_rows([self.ffn] * 2, [sets + 3, sets + 4], h))
            sets += 5
        return found


#: Odd everywhere, so that no segment is a multiple of a vector register; k and q gains of length 1.
TINY = Transformer(layers=3, hidden=13, ffn=7, groups=3, queries=2, head_dim=1, vocab=11)


def random_values(count: int, seed: int = 0) -> list[AdamWValues]:
    """Sets that differ in all five values, with eps around the gradients' size of 1e-3.

    Betas and lr * weight_decay are short binary fractions, which float32 holds exactly. With others
    the factors beta and 1 - lr * weight_decay are off by up to 2^-25, the same way in each step,
    and 100 steps would drift by 3e-6 in any float32 AdamW.
    """
    rng = random.Random(seed)
    values = [
        AdamWValues(
            lr=rng.randint(1, 32) / 2**12,
            weight_decay=rng.randint(0, 8) / 2**5,
            eps=2.0 ** -rng.randint(10, 16),
            beta1=rng.randint(51, 62) / 2**6,
            beta2=rng.randint(230, 255) / 2**8,
        )
        for _ in range(count)
    ]
    assert len(set(values)) == count
    return values


def uneven_values(count: int, seed: int = 0) -> list[AdamWValues]:
    """Sets with any digits, over the ranges that a search would try."""
    rng = random.Random(seed)
    return [
        AdamWValues(
            lr=10 ** rng.uniform(-4, -2),
            weight_decay=rng.uniform(0, 0.3),
            eps=10 ** rng.uniform(-8, -3),
            beta1=rng.uniform(0.8, 0.97),
            beta2=rng.uniform(0.9, 0.999),
        )
        for _ in range(count)
    ]


def set_count(segments: list[tuple[Segment, ...]]) -> int:
    """Number of sets that the segments refer to."""
    return 1 + max(segment.values for of in segments for segment in of)


class Oracle:
    """The reference, segment by segment, beside the optimizer under test.

    In float64 its own rounding is nothing, so a difference is the rounding, or the error, of the
    fast path alone. In float32 it rounds as the fast path does, and nearly all of that drops out.
    """

    def __init__(
        self,
        params: list[torch.Tensor],
        segments: list[tuple[Segment, ...]],
        table: list[AdamWValues],
        *,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.params = [param.detach().view(-1).to("cpu", dtype, copy=True) for param in params]
        self.exp_avgs = [torch.zeros_like(param) for param in self.params]
        self.exp_avg_sqs = [torch.zeros_like(param) for param in self.params]
        self.segments, self.table, self.dtype = segments, table, dtype

    def step(self, grads: list[torch.Tensor], inputs: StepInputs) -> None:
        """One step of all tensors."""
        tensors = zip(
            self.params, grads, self.exp_avgs, self.exp_avg_sqs, self.segments, strict=True
        )
        for param, grad, exp_avg, exp_avg_sq, segments in tensors:
            flat = grad.view(-1).to("cpu", self.dtype)
            for segment in segments:
                part = slice(segment.start, segment.stop)
                values = self.table[segment.values]
                reference_adamw(
                    param[part], flat[part], exp_avg[part], exp_avg_sq[part], values, inputs
                )

    def errors(self, optimizer: torch.optim.Optimizer) -> list[float]:
        """RMS difference from the optimizer's over RMS: for each tensor its weights and moments.

        By tensor and not by element: where a weight crosses zero, no float32 result has a small
        relative error.
        """
        found = []
        for i, param in enumerate(optimizer.param_groups[0]["params"]):
            state = optimizer.state[param]
            pairs = [
                (self.params[i], param),
                (self.exp_avgs[i], state["exp_avg"]),
                (self.exp_avg_sqs[i], state["exp_avg_sq"]),
            ]
            for exact, tensor in pairs:
                difference = tensor.detach().double().view(-1).cpu() - exact.double()
                found.append((difference.norm() / exact.norm()).item())
        return found


def _one_set(shape: Shape, values: int) -> ShapedSegments:
    return shape, (Segment(0, torch.Size(shape).numel(), values),)


def _by_rows(lengths: list[int], sets: list[int], columns: int) -> ShapedSegments:
    rows, start = [], 0
    for length, values in zip(lengths, sets, strict=True):
        rows.append(Segment(start, start + length, values))
        start += length
    return (start, columns), segments_of_shard(rows, columns, 0, start * columns)
