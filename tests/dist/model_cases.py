"""Forward and backward of the tiny model under parallel layouts; run by `harness`.

Each case returns, per rank, the loss and the gradients of the parameters that live there, under
their names in the whole model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megatron_completedp.config.parallel import ParallelConfig
from megatron_completedp.core.hyperparams import ResidualMultiplier
from megatron_completedp.core.shape import ModelShape
from megatron_completedp.mcore.loss import cross_entropy_with_z_loss
from megatron_completedp.mcore.model import build_model
from megatron_completedp.mcore.parallel import (
    ParallelState,
    destroy_parallel,
    initialize_parallel,
)
from megatron_completedp.mcore.platform import CpuPlatform
from tests.mcore.common import LOGIT_MULTIPLIER, Z_LOSS, batch, tiny_shape, uneven_residual
from tests.oracle import megatron_weights


def tp2() -> dict[str, Any]:
    return step(tiny_shape(), ParallelConfig(tensor_model_parallel_size=2))


def tp2_unreduced() -> dict[str, Any]:
    """As tp2, but without the step that sums q and k gains over the heads of all ranks."""
    return step(tiny_shape(), ParallelConfig(tensor_model_parallel_size=2), finalize=False)


def tp2_gelu_tied() -> dict[str, Any]:
    shape = tiny_shape(activation="gelu", tied_embeddings=True)
    return step(shape, ParallelConfig(tensor_model_parallel_size=2))


def tp2_sequence_parallel() -> dict[str, Any]:
    return step(tiny_shape(), ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True))


def tp2_sequence_parallel_unreduced() -> dict[str, Any]:
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    return step(tiny_shape(), parallel, finalize=False)


def tp2_without_residual() -> dict[str, Any]:
    shape = tiny_shape()
    ones = [ResidualMultiplier(layer=i, attention=1, mlp=1) for i in range(shape.num_layers)]
    return step(shape, ParallelConfig(tensor_model_parallel_size=2), residual=ones)


def tp2_without_z_loss() -> dict[str, Any]:
    return step(tiny_shape(), ParallelConfig(tensor_model_parallel_size=2), z_loss=0.0)


def pp2() -> dict[str, Any]:
    return step(tiny_shape(), ParallelConfig(pipeline_model_parallel_size=2))


def pp2_vpp2() -> dict[str, Any]:
    parallel = ParallelConfig(
        pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2
    )
    return step(tiny_shape(), parallel)


def loss_tp2() -> dict[str, Any]:
    """The loss alone on a vocabulary split in two, against the same call on the whole."""
    state = initialize_parallel(
        CpuPlatform(), ParallelConfig(tensor_model_parallel_size=2), timeout_s=60, seed=1
    )
    group = parallel_state.get_tensor_model_parallel_group()
    worst = {}
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(0)
        whole = (3 * torch.randn(9, 2, 64, generator=generator)).to(dtype).requires_grad_()
        labels = torch.randint(64, (9, 2), generator=generator)
        expected, expected_ce = cross_entropy_with_z_loss(whole, labels, 0.1)
        expected.sum().backward()
        mine = slice(32 * state.tp_rank, 32 * (state.tp_rank + 1))
        part = whole.detach()[..., mine].clone().requires_grad_()
        loss, cross_entropy = cross_entropy_with_z_loss(part, labels, 0.1, group)
        loss.sum().backward()
        assert part.grad is not None
        assert whole.grad is not None
        worst[str(dtype)] = {
            "loss": (loss - expected).abs().max().item(),
            "cross_entropy": (cross_entropy - expected_ce).abs().max().item(),
            "grad": (part.grad - whole.grad[..., mine]).abs().max().item(),
        }
    destroy_parallel(keep_process_group=True)
    return worst


def step(
    shape: ModelShape,
    parallel: ParallelConfig,
    *,
    residual: list[ResidualMultiplier] | None = None,
    z_loss: float = Z_LOSS,
    finalize: bool = True,
) -> dict[str, Any]:
    """One forward and backward of the whole batch, in as many microbatches as there are rows."""
    state = initialize_parallel(CpuPlatform(), parallel, timeout_s=60, seed=1)
    chunks = build_model(
        shape,
        parallel,
        platform=CpuPlatform(),
        precision="fp32",
        residual=residual or uneven_residual(shape.num_layers),
        z_loss=z_loss,
        logit_multiplier=LOGIT_MULTIPLIER,
    )
    config = chunks[0].config
    load_shards(chunks, shape, state)
    wrapped = [
        DistributedDataParallel(config, DistributedDataParallelConfig(), chunk) for chunk in chunks
    ]
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    config.finalize_model_grads_func = finalize_model_grads if finalize else None
    tokens, labels = batch(shape)
    losses = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(zip(tokens, labels, strict=True)) for _ in wrapped],
        model=wrapped,
        num_microbatches=len(tokens),
        seq_length=shape.seq_length,
        micro_batch_size=1,
    )
    result = {
        "state": state,
        "loss": torch.stack(losses).mean().item() if losses else None,
        "grads": {
            whole_name(chunk, name): parameter.main_grad.clone()
            for chunk in chunks
            for name, parameter in chunk.named_parameters()
        },
    }
    destroy_parallel(keep_process_group=True)
    return result


def forward_step(
    data: Iterator[tuple[Tensor, Tensor]], model: nn.Module
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]:
    tokens, labels = next(data)
    output = model(tokens[None], position_ids=None, attention_mask=None, labels=labels[None])
    return output, mean_loss


def mean_loss(output: Tensor) -> tuple[Tensor, Tensor]:
    loss = output.mean()
    return loss, loss.detach().clone()  # the schedule divides the first one in place


def load_shards(chunks: list[Any], shape: ModelShape, state: ParallelState) -> None:
    weights = megatron_weights(shape)
    if shape.tied_embeddings:
        weights["output_layer.weight"] = weights["embedding.word_embeddings.weight"]
    with torch.no_grad():
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                whole = weights[whole_name(chunk, name)]
                parameter.copy_(shard(name, whole, shape, state.tp_rank, state.tp_size))


def whole_name(chunk: nn.Module, name: str) -> str:
    """The name in the whole model: a chunk counts its layers from 0."""

    def global_layer(match: re.Match[str]) -> str:
        layer = chunk.get_submodule(match.group(0))
        return f"decoder.layers.{layer.layer_number - 1}"

    return re.sub(r"decoder\.layers\.\d+", global_layer, name)


def split_dim(name: str) -> int | None:
    """The dimension that tensor parallelism splits, None for gains."""
    if "layernorm" in name:
        return None
    return 1 if "linear_proj" in name or "linear_fc2" in name else 0


def shard(name: str, whole: Tensor, shape: ModelShape, rank: int, size: int) -> Tensor:
    """This rank's part of a whole tensor; gate and up are split each on its own."""
    dim = split_dim(name)
    if dim is None:
        return whole
    blocks = 2 if "linear_fc1" in name and shape.gated else 1
    return torch.cat([b.chunk(size, dim)[rank] for b in whole.chunk(blocks, dim)], dim)


def unshard(name: str, parts: list[Tensor], shape: ModelShape) -> Tensor:
    """The whole tensor from all ranks' parts, the inverse of `shard`."""
    dim = split_dim(name)
    if dim is None:
        return parts[0]
    blocks = 2 if "linear_fc1" in name and shape.gated else 1
    return torch.cat([p.chunk(blocks, dim)[b] for b in range(blocks) for p in parts], dim)
