"""One module's initial weight: the same for every engine, parallel layout and process."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from megatron_completedp.core.roles import Module
from megatron_completedp.core.shape import ModelShape
from megatron_completedp.mcore.classify import module_shape


def draw_weight(
    module: Module, layer: int | None, shape: ModelShape, std: float, *, seed: int
) -> Tensor:
    """Draw one whole, unfused weight in fp32 on the CPU, of shape `module_shape(module, shape)`.

    The draw is normal(0, 1) from a stream of (seed, module, layer), times std: another std
    scales the same weights, and no other module's draw moves. Padded vocabulary rows are drawn
    like the rest.
    """
    # A cryptographic hash keeps the streams of neighbouring layers and seeds apart, and unlike
    # Python's hash() it is the same in every process.
    digest = hashlib.sha256(f"{seed}/{module}/{layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
    return torch.randn(module_shape(module, shape), generator=generator).mul_(std)
