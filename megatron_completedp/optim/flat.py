"""CPU backend: torch's fused AdamW kernel, called once per set of values on views of its segments.

The kernel passes over memory once whatever the number of views; a view costs it about a
microsecond. A call costs about five, and three times that after one so large that it evicted
torch's code from the processor's caches; so nothing that can be kept between steps is made anew.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_completedp.errors import ConfigError
from megatron_completedp.optim.backend import AdamWTensors, StepInputs
from megatron_completedp.optim.segments import AdamWValues, Segment

#: By index of the set of values: the views of its segments, in the order of the tensors.
_Views = dict[int, list[Tensor]]

_GRAD = AdamWTensors._fields.index("grad")


class FlatAdamW:
    """AdamW on float32 CPU tensors. With a grad_scale other than 1 it leaves .grad scaled."""

    def __init__(self, segments: Sequence[Sequence[Segment]]) -> None:
        """`segments[i]` covers the i-th tensor that every step will be given.

        Raises ConfigError when this torch has no fused AdamW kernel.
        """
        if not hasattr(torch, "_fused_adamw_"):
            raise ConfigError(
                f"torch {torch.__version__} has no torch._fused_adamw_, the kernel that updates "
                "weights on CPU; expected torch 2.6 or newer. Install one."
            )
        self._lengths = [[segment.length for segment in of] for of in segments]
        self._sets = [[segment.values for segment in of] for of in segments]
        sizes: Counter[int] = Counter()
        for segment in itertools.chain.from_iterable(segments):
            sizes[segment.values] += segment.length
        # By size: a small call after another small one finds the caches warm.
        self._order = sorted(sizes, key=sizes.__getitem__)
        # The kernel reads the finished steps, one tensor for each view, and counts nothing itself.
        self._step = torch.zeros(())
        counts = Counter(itertools.chain.from_iterable(self._sets))
        self._steps = {index: [self._step] * count for index, count in counts.items()}
        # For each field of AdamWTensors: the tensors' addresses and the views made of them.
        self._addresses: list[list[int]] = [[] for _ in AdamWTensors._fields]
        self._views: list[_Views] = [{} for _ in AdamWTensors._fields]

    def step(
        self, tensors: Sequence[AdamWTensors], table: Sequence[AdamWValues], inputs: StepInputs
    ) -> None:
        """See Backend.step. Raises ConfigError for gradients that are not float32."""
        self._refresh(tensors)
        self._step.fill_(inputs.step)
        params, grads, exp_avgs, exp_avg_sqs = self._views
        # It divides by its grad_scale and stores the quotient in the gradient; None skips both.
        divisor = None if inputs.grad_scale == 1 else torch.tensor(1 / inputs.grad_scale)
        for index in self._order:
            values = table[index]
            torch._fused_adamw_(
                params[index],
                grads[index],
                exp_avgs[index],
                exp_avg_sqs[index],
                [],
                self._steps[index],
                lr=inputs.lr_fraction * values.lr,
                beta1=values.beta1,
                beta2=values.beta2,
                weight_decay=values.weight_decay,
                eps=values.eps,
                amsgrad=False,
                maximize=False,
                grad_scale=divisor,
            )

    def release_gradients(self) -> None:
        """See Backend.release_gradients."""
        self._addresses[_GRAD], self._views[_GRAD] = [], {}

    def _refresh(self, tensors: Sequence[AdamWTensors]) -> None:
        """Make the views anew of what has moved, such as the moments on load."""
        for field, column in enumerate(zip(*tensors, strict=True)):
            addresses = [tensor.data_ptr() for tensor in column]
            if addresses == self._addresses[field]:
                continue
            if field == _GRAD:
                _check_gradients(column)
            self._views[field], self._addresses[field] = self._views_of(column), addresses

    def _views_of(self, tensors: Sequence[Tensor]) -> _Views:
        views: _Views = {}
        for tensor, lengths, sets in zip(tensors, self._lengths, self._sets, strict=True):
            # Most tensors are one segment, and making a view costs microseconds.
            parts = [tensor] if len(sets) == 1 else tensor.view(-1).split_with_sizes(lengths)
            for part, values in zip(parts, sets, strict=True):
                views.setdefault(values, []).append(part)
        return views


def _check_gradients(grads: Sequence[Tensor]) -> None:
    for grad in grads:
        if grad.dtype is not torch.float32:
            raise ConfigError(
                f"a gradient on CPU is {grad.dtype}; expected float32. Accumulate gradients in "
                "float32 (accumulate_allreduce_grads_in_fp32)."
            )
