"""Which modules the layers are made of. Megatron's own specs, with the few fields we need replaced.

Pre-norm RMSNorm, QK norm, causal attention, no biases, and one residual multiplier per layer and
branch. Two variants compute the same: `local` from torch's operations, and Transformer Engine's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron_completedp.core.hyperparams import ResidualMultiplier
from megatron_completedp.errors import ConfigError
from megatron_completedp.mcore.attention import SdpaAttention
from megatron_completedp.mcore.kernel_packages import probe_transformer_engine
from megatron_completedp.mcore.norm import RMSNorm
from megatron_completedp.mcore.platform import Platform

logger = logging.getLogger(__name__)

_Add = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]


def use_transformer_engine(platform: Platform) -> bool:
    """Whether layers come from Transformer Engine; logs which variant was chosen and why."""
    status = probe_transformer_engine()
    chosen = status.usable and platform.name == "cuda"
    reason = status.reason
    if status.usable and not chosen:
        reason = f"Transformer Engine needs CUDA and the platform is {platform.name}"
    logger.info("Layers: %s, because %s.", "transformer_engine" if chosen else "local", reason)
    return chosen


def block_spec(
    config: TransformerConfig,
    residual: Sequence[ResidualMultiplier],
    *,
    transformer_engine: bool,
    vp_stage: int | None = None,
) -> TransformerBlockSubmodules:
    """Specs of the layers that this pipeline stage (and virtual chunk `vp_stage`) builds.

    `residual` holds the multipliers of the whole model, layer 0 first. Raises ConfigError when it
    does not name every layer once, in order.
    """
    layers = [entry.layer for entry in residual]
    if layers != list(range(config.num_layers)):
        raise ConfigError(
            f"residual multipliers are given for layers {layers}; expected one for each of the "
            f"{config.num_layers} layers, in order from 0."
        )
    offset = get_transformer_layer_offset(config, vp_stage=vp_stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    spec = _transformer_engine_layer() if transformer_engine else _local_layer()
    return TransformerBlockSubmodules(
        layer_specs=[
            replace(
                spec,
                submodules=replace(
                    spec.submodules,
                    self_attn_bda=_scaled_residual(entry.attention),
                    mlp_bda=_scaled_residual(entry.mlp),
                ),
            )
            for entry in residual[offset : offset + count]
        ],
        layer_norm=_transformer_engine_norm() if transformer_engine else RMSNorm,
    )


def _local_layer() -> ModuleSpec:
    spec = get_gpt_layer_local_spec(qk_layernorm=True)
    layer = spec.submodules
    attention = replace(
        layer.self_attention.submodules,
        core_attention=SdpaAttention,
        q_layernorm=RMSNorm,
        k_layernorm=RMSNorm,
    )
    return replace(
        spec,
        submodules=replace(
            layer,
            input_layernorm=RMSNorm,
            self_attention=replace(layer.self_attention, submodules=attention),
            pre_mlp_layernorm=RMSNorm,
        ),
    )


def _transformer_engine_layer() -> ModuleSpec:
    return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=True)


def _transformer_engine_norm() -> type:
    # Importable only where Transformer Engine is.
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm


def _scaled_residual(multiplier: float) -> Callable[[bool, bool], _Add]:
    """A bias-dropout-add for the spec that computes h <- h + multiplier * F(norm(h)).

    The model has neither biases nor dropout, so the addition is all that remains of it.
    """

    def bias_dropout_add(training: bool, fused: bool) -> _Add:
        return add

    def add(branch: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
        output, bias = branch
        assert bias is None, "the model was built with biases"
        assert dropout == 0, "the model was built with dropout"
        return torch.add(residual, output, alpha=multiplier)

    return bias_dropout_add
