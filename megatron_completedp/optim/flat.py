"""CPU backend: torch's fused AdamW kernel, called once per set of values on views of its segments.

The kernel passes over memory once whatever the number of views; a view costs it about half a
microsecond, a call a few.
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
        # By size, because a large call evicts torch's code from the processor's caches: a small
        # call after another small one takes less than half the time.
        self._order = sorted(sizes, key=sizes.__getitem__)
        self._addresses: list[int] = []
        # Views of the weights, first moments and second moments.
        self._params: _Views = {}
        self._exp_avgs: _Views = {}
        self._exp_avg_sqs: _Views = {}

    def step(
        self, tensors: Sequence[AdamWTensors], table: Sequence[AdamWValues], inputs: StepInputs
    ) -> None:
        """See Backend.step. Raises ConfigError for gradients that are not float32."""
        for tensor in tensors:
            if tensor.grad.dtype is not torch.float32:
                raise ConfigError(
                    f"a gradient on CPU is {tensor.grad.dtype}; expected float32. Accumulate "
                    "gradients in float32 (accumulate_allreduce_grads_in_fp32)."
                )
        self._refresh(tensors)
        # Not kept between steps: views would hold memory that zero_grad means to free.
        grads = self._views([tensor.grad for tensor in tensors])
        # The kernel reads the finished steps, this one included, and counts nothing itself.
        step = torch.tensor(float(inputs.step))
        # It divides by its grad_scale and stores the quotient in the gradient; None skips both.
        divisor = None if inputs.grad_scale == 1 else torch.tensor(1 / inputs.grad_scale)
        for index in self._order:
            views, values = self._params[index], table[index]
            torch._fused_adamw_(
                views,
                grads[index],
                self._exp_avgs[index],
                self._exp_avg_sqs[index],
                [],
                [step] * len(views),
                lr=inputs.lr_fraction * values.lr,
                beta1=values.beta1,
                beta2=values.beta2,
                weight_decay=values.weight_decay,
                eps=values.eps,
                amsgrad=False,
                maximize=False,
                grad_scale=divisor,
            )

    def _refresh(self, tensors: Sequence[AdamWTensors]) -> None:
        """Make the views of weights and moments anew if any of them moved, e.g. on load."""
        addresses = [
            tensor.data_ptr() for t in tensors for tensor in (t.param, t.exp_avg, t.exp_avg_sq)
        ]
        if addresses != self._addresses:
            self._params = self._views([t.param for t in tensors])
            self._exp_avgs = self._views([t.exp_avg for t in tensors])
            self._exp_avg_sqs = self._views([t.exp_avg_sq for t in tensors])
            self._addresses = addresses

    def _views(self, tensors: Sequence[Tensor]) -> _Views:
        views: _Views = {}
        for tensor, lengths, sets in zip(tensors, self._lengths, self._sets, strict=True):
            # Most tensors are one segment, and making a view costs microseconds.
            parts = [tensor] if len(sets) == 1 else tensor.view(-1).split_with_sizes(lengths)
            for part, values in zip(parts, sets, strict=True):
                views.setdefault(values, []).append(part)
        return views
