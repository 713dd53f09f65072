"""Shapes, weights and batches that the engine's tests share, in one process and in several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_completedp.core.hyperparams import ResidualMultiplier
from megatron_completedp.core.shape import ModelShape
from tests.oracle import PlainGPT, from_megatron, megatron_weights

Z_LOSS = 1e-2
LOGIT_MULTIPLIER = 0.7


def tiny_shape(**changes: Any) -> ModelShape:
    """Grouped queries, SwiGLU, a padded vocabulary: everything that can go wrong, in 0.2M."""
    sizes = {
        "num_layers": 4,
        "hidden_size": 96,
        "ffn_hidden_size": 160,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "head_dim": 32,
        "vocab_size": 250,
        "seq_length": 24,
        "vocab_multiple": 64,
    }
    return ModelShape(**{**sizes, **changes})


def uneven_residual(num_layers: int) -> list[ResidualMultiplier]:
    """Multipliers that differ between all layers and branches, so that no swap goes unseen."""
    return [
        ResidualMultiplier(layer=layer, attention=0.5 + 0.1 * layer, mlp=0.9 - 0.13 * layer)
        for layer in range(num_layers)
    ]


def batch(shape: ModelShape, size: int = 2) -> tuple[Tensor, Tensor]:
    """Random tokens and next-token labels, [size, sequence] each, the same in every process."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(shape.vocab_size, (size, shape.seq_length + 1), generator=generator)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def oracle_step(
    shape: ModelShape,
    residual: Sequence[ResidualMultiplier],
    *,
    z_loss: float = Z_LOSS,
    logit_multiplier: float = LOGIT_MULTIPLIER,
) -> tuple[float, float, dict[str, Tensor]]:
    """PlainGPT's loss, plain cross entropy and gradients on the shared weights and batch."""
    model = PlainGPT(shape, residual, z_loss=z_loss, logit_multiplier=logit_multiplier)
    model.load_from_megatron(megatron_weights(shape))
    loss, cross_entropy = model(*batch(shape))
    loss.backward()
    return loss.item(), cross_entropy.item(), gradients_of(model)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by parameter name."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def load_whole_weights(model: nn.Module, shape: ModelShape) -> None:
    """Copy the shared weights into a one-process Megatron model; each parameter gets one."""
    weights = megatron_weights(shape)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.pop(name))
    assert not weights


def largest_error(
    shape: ModelShape, got: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> float:
    """Largest relative error ||got - expected|| / ||expected|| over tensors.

    `got` has Megatron's names and whole tensors, `expected` PlainGPT's. A missing tensor counts.
    """
    renamed = from_megatron(shape, got)
    assert renamed.keys() == expected.keys()
    return max(
        ((renamed[name] - value).norm() / value.norm()).item() for name, value in expected.items()
    )
