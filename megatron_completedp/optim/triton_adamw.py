"""CUDA backend: one Triton launch updates all segments of all tensors.

This kernel has run in Triton's interpreter on CPU and compiled for CUDA; it has not yet run on a
GPU. Import this module lazily: it needs triton, which CPU installations may lack.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_completedp.errors import ConfigError
from megatron_completedp.optim.backend import AdamWTensors, StepInputs
from megatron_completedp.optim.segments import AdamWValues, Segment

#: Elements per program. With 8 warps each thread has 16 elements of four tensors in flight, enough
#: to hide memory latency, and the block table costs 8 bytes per 4096 elements: 0.02 % of the state.
BLOCK = 4096
WARPS = 8


@triton.jit
def adamw_kernel(
    blocks: tl.tensor,
    segments: tl.tensor,
    values: tl.tensor,
    grad_scale: tl.tensor,
    GRAD_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Update one block of one segment; the equation is reference_adamw's.

    Args:
        blocks: int32 (programs, 2): segment, and which of its blocks of BLOCK elements.
        segments: int64 (segments, 6): addresses of param, grad, exp_avg, exp_avg_sq; length; set.
        values: float32 (sets, 8), one row of `_step_values` for each set.
        grad_scale: float32 factor on the gradients.
        GRAD_DTYPE: element type of the gradients.
        BLOCK: elements per program.

    """
    block = blocks + 2 * tl.program_id(0)
    segment = segments + 6 * tl.load(block)
    # 64 bits: a segment may have more than 2^31 elements.
    offset = tl.load(block + 1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < tl.load(segment + 4)
    params = tl.load(segment).to(tl.pointer_type(tl.float32)) + offset
    grads = tl.load(segment + 1).to(tl.pointer_type(GRAD_DTYPE)) + offset
    exp_avgs = tl.load(segment + 2).to(tl.pointer_type(tl.float32)) + offset
    exp_avg_sqs = tl.load(segment + 3).to(tl.pointer_type(tl.float32)) + offset

    row = values + 8 * tl.load(segment + 5)
    step_size, decay, eps = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    beta1, one_minus_beta1 = tl.load(row + 3), tl.load(row + 4)
    beta2, one_minus_beta2 = tl.load(row + 5), tl.load(row + 6)
    root_correction2 = tl.load(row + 7)

    g = tl.load(grads, mask=inside).to(tl.float32) * grad_scale
    m = beta1 * tl.load(exp_avgs, mask=inside) + one_minus_beta1 * g
    v = beta2 * tl.load(exp_avg_sqs, mask=inside) + one_minus_beta2 * g * g
    # Correctly rounded like torch's kernels; memory is the limit, so it costs no time.
    denominator = tl.div_rn(tl.sqrt_rn(v), root_correction2) + eps
    theta = decay * tl.load(params, mask=inside) - step_size * tl.div_rn(m, denominator)
    tl.store(exp_avgs, m, mask=inside)
    tl.store(exp_avg_sqs, v, mask=inside)
    tl.store(params, theta, mask=inside)


class TritonAdamW:
    """AdamW on float32 weights and moments with float32 or bfloat16 gradients, left as they are."""

    def __init__(self, segments: Sequence[Sequence[Segment]], device: torch.device) -> None:
        """`segments[i]` covers the i-th tensor that every step will be given."""
        self._segments = segments
        self._blocks = _block_table([s.length for of in segments for s in of]).to(device)
        self._addresses: list[tuple[int, ...]] = []
        self._table = torch.empty(0)

    def step(
        self, tensors: Sequence[AdamWTensors], table: Sequence[AdamWValues], inputs: StepInputs
    ) -> None:
        """See Backend.step. Raises ConfigError for gradients of another or of mixed types."""
        dtypes = {tensor.grad.dtype for tensor in tensors}
        if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.bfloat16}:
            raise ConfigError(
                f"gradients are {', '.join(sorted(map(str, dtypes)))}; expected all float32 or all "
                "bfloat16. Accumulate gradients in float32 (accumulate_allreduce_grads_in_fp32)."
            )
        device = self._blocks.device
        addresses = [tuple(tensor.data_ptr() for tensor in of) for of in tensors]
        if addresses != self._addresses:
            rows = [
                [*(t.data_ptr() + s.start * t.element_size() for t in of), s.length, s.values]
                for of, segments in zip(tensors, self._segments, strict=True)
                for s in segments
            ]
            self._table, self._addresses = _to_device(rows, torch.int64, device), addresses
        adamw_kernel[(len(self._blocks),)](
            self._blocks,
            self._table,
            _to_device([_step_values(v, inputs) for v in table], torch.float32, device),
            inputs.grad_scale,
            GRAD_DTYPE=tl.bfloat16 if dtypes == {torch.bfloat16} else tl.float32,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )

    def release_gradients(self) -> None:
        """See Backend.release_gradients; this backend keeps addresses alone."""


def _block_table(lengths: Sequence[int]) -> Tensor:
    """Int32 (blocks, 2): for every block of every segment its segment and its number therein."""
    counts = torch.tensor([-(-length // BLOCK) for length in lengths])
    segment = torch.repeat_interleave(torch.arange(len(lengths)), counts)
    first = torch.cumsum(counts, 0) - counts
    number = torch.arange(len(segment)) - first[segment]
    return torch.stack([segment, number], dim=1).to(torch.int32).contiguous()


def _step_values(values: AdamWValues, inputs: StepInputs) -> list[float]:
    """The kernel's row of one set, computed in double: 1 - beta in float32 would lose digits."""
    eta = inputs.lr_fraction * values.lr
    return [
        eta / (1 - values.beta1**inputs.step),
        1 - eta * values.weight_decay,
        values.eps,
        values.beta1,
        1 - values.beta1,
        values.beta2,
        1 - values.beta2,
        (1 - values.beta2**inputs.step) ** 0.5,
    ]


def _to_device(rows: Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device) -> Tensor:
    # A copy from pinned memory waits for nothing; torch keeps the source until it is done.
    host = torch.tensor(rows, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)
