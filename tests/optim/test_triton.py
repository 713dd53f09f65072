"""The Triton backend: on a GPU where there is one, else in Triton's interpreter on CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_completedp.errors import ConfigError
from megatron_completedp.optim.backend import AdamWTensors, StepInputs
from megatron_completedp.optim.per_module import PerModuleAdamW
from megatron_completedp.optim.segments import AdamWValues, Segment
from tests.optim.transformer import TINY, Oracle, random_values, set_count

triton_adamw = pytest.importorskip(
    "megatron_completedp.optim.triton_adamw", reason="triton is not installed"
)
BLOCK, TritonAdamW = triton_adamw.BLOCK, triton_adamw.TritonAdamW
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

#: The interpreter takes half a second for a step; the third has a grad_scale.
STEPS = 4


def run(
    params: list[torch.Tensor],
    segments: list[tuple[Segment, ...]],
    table: list[AdamWValues],
    grad_dtype: torch.dtype = torch.float32,
    oracle_table: list[AdamWValues] | None = None,
) -> float:
    """Worst error of the weights against the oracle, as max difference over 1 + |weight|."""
    oracle = Oracle(params, segments, oracle_table or table)
    backend = TritonAdamW(segments, DEVICE)
    moments = [(torch.zeros_like(param), torch.zeros_like(param)) for param in params]
    for number in range(1, STEPS + 1):
        # New memory in every step: the address table must follow.
        grads = [(1e-3 * torch.randn(p.shape)).to(DEVICE, grad_dtype) for p in params]
        inputs = StepInputs(
            step=number, lr_fraction=number / STEPS, grad_scale=0.25 if number % 3 == 0 else 1.0
        )
        tensors = [
            AdamWTensors(param, grad, *of)
            for param, grad, of in zip(params, grads, moments, strict=True)
        ]
        backend.step(tensors, table, inputs)
        oracle.step(grads, inputs)
    return max(
        ((param.double().view(-1).cpu() - exact).abs() / (1 + exact.abs())).max().item()
        for param, exact in zip(params, oracle.params, strict=True)
    )


def tiny() -> tuple[list[torch.Tensor], list[tuple[Segment, ...]], list[AdamWValues]]:
    torch.manual_seed(0)
    tensors = TINY.tensors()
    segments = [of for _, of in tensors]
    params = [torch.randn(shape).to(DEVICE) for shape, _ in tensors]
    return params, segments, random_values(set_count(segments))


#: A rounding of 2^-24 for each step, and as much for the update's own.
TOLERANCE = 2 * STEPS * 2**-24


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_every_module_of_every_layer_follows_the_algorithm_box(grad_dtype: torch.dtype) -> None:
    assert run(*tiny(), grad_dtype=grad_dtype) < TOLERANCE


def test_the_comparison_catches_a_wrong_eps() -> None:
    params, segments, table = tiny()
    wrong = [*table]
    # A gain of length 1 in the last layer: one element of the whole model.
    wrong[-7] = AdamWValues(**{**vars(table[-7]), "eps": 4 * table[-7].eps})
    assert run(params, segments, wrong, oracle_table=table) > 10 * TOLERANCE


def test_segments_longer_than_a_block() -> None:
    lengths = [BLOCK - 1, 1, 2 * BLOCK + 1, BLOCK]
    segments, start = [], 0
    for values, length in enumerate(lengths):
        segments.append(Segment(start, start + length, values))
        start += length
    params = [torch.randn(start).to(DEVICE), torch.randn(3).to(DEVICE)]
    every = [tuple(segments), (Segment(0, 3, 1),)]
    assert run(params, every, random_values(len(lengths))) < TOLERANCE


def test_tables_are_small_against_the_state() -> None:
    # As many blocks and segments for each element as the smallest real model would have.
    param = torch.zeros(10 * BLOCK, device=DEVICE)
    segments = [(Segment(0, 5 * BLOCK, 0), Segment(5 * BLOCK, 10 * BLOCK, 1))]
    backend = TritonAdamW(segments, DEVICE)
    tensors = AdamWTensors(param, param.clone(), param.clone(), param.clone())
    inputs = StepInputs(step=1, lr_fraction=1.0, grad_scale=1.0)
    backend.step([tensors], random_values(2), inputs)
    held = [value for value in vars(backend).values() if isinstance(value, torch.Tensor)]
    assert len(held) == 2
    state = 2 * param.nbytes
    assert sum(tensor.nbytes for tensor in held) < 0.01 * state


def test_mixed_gradients_are_refused() -> None:
    params = [torch.zeros(3, device=DEVICE), torch.zeros(3, device=DEVICE)]
    backend = TritonAdamW([(Segment(0, 3, 0),)] * 2, DEVICE)
    tensors = [
        AdamWTensors(param, param.to(dtype), param.clone(), param.clone())
        for param, dtype in zip(params, (torch.float32, torch.bfloat16), strict=True)
    ]
    inputs = StepInputs(step=1, lr_fraction=1.0, grad_scale=1.0)
    with pytest.raises(ConfigError, match="all float32 or all bfloat16"):
        backend.step(tensors, random_values(1), inputs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_weights_on_a_gpu_are_updated_by_this_backend() -> None:
    params, segments, table = tiny()
    oracle = Oracle(params, segments, table)
    optimizer = PerModuleAdamW(params)
    optimizer.assign(table, dict(zip(params, segments, strict=True)))
    for param in params:
        param.grad = 1e-3 * torch.randn_like(param)
    optimizer.grad_scale = 0.25
    grads = [param.grad.clone() for param in params]
    optimizer.step()
    oracle.step(grads, StepInputs(step=1, lr_fraction=1.0, grad_scale=0.25))
    # One step rounds a weight twice at most, and the moments a few times.
    assert max(oracle.errors(optimizer)) < 4 * 2**-24
    assert all(torch.equal(p.grad, grad) for p, grad in zip(params, grads, strict=True))


_COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_completedp.optim.triton_adamw import BLOCK, WARPS, adamw_kernel
for grad in (triton.language.float32, triton.language.bfloat16):
    source = ASTSource(
        fn=adamw_kernel,
        signature={"blocks": "*i32", "segments": "*i64", "values": "*fp32", "grad_scale": "fp32",
                   "GRAD_DTYPE": "constexpr", "BLOCK": "constexpr"},
        constexprs={"GRAD_DTYPE": grad, "BLOCK": BLOCK},
    )
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": WARPS})
    assert kernel.asm["cubin"], "no machine code"
"""


def test_the_kernel_compiles_for_cuda_without_a_gpu(tmp_path: Path) -> None:
    """To machine code of compute capability 9.0; the interpreter alone would accept too much."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
