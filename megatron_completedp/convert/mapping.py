"""Which Hugging Face tensor each module becomes, and which factor is folded into it.

The table. Everything else in this package walks over it: a module (`core.roles.Module`) lies in
rows of one Megatron tensor (`MEGATRON_NAMES`, rows by `mcore.classify`), and becomes one tensor of
a Hugging Face architecture (`Architecture.names`). Needs neither torch nor transformers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from megatron_completedp.core.hyperparams import ResidualMultiplier
from megatron_completedp.core.roles import OUTSIDE_STACK, Module
from megatron_completedp.core.shape import ModelShape
from megatron_completedp.errors import ConversionError

#: The tensor of a checkpoint that holds each module, with {layer} inside the stack. Layers of torch
#: operations and of Transformer Engine are saved by the same names.
MEGATRON_NAMES: MappingProxyType[Module, str] = MappingProxyType(
    {
        Module.EMBEDDING: "embedding.word_embeddings.weight",
        Module.ATTENTION_NORM: "decoder.layers.{layer}.self_attention.linear_qkv.layer_norm_weight",
        Module.Q: "decoder.layers.{layer}.self_attention.linear_qkv.weight",
        Module.K: "decoder.layers.{layer}.self_attention.linear_qkv.weight",
        Module.V: "decoder.layers.{layer}.self_attention.linear_qkv.weight",
        Module.Q_NORM: "decoder.layers.{layer}.self_attention.q_layernorm.weight",
        Module.K_NORM: "decoder.layers.{layer}.self_attention.k_layernorm.weight",
        Module.O: "decoder.layers.{layer}.self_attention.linear_proj.weight",
        Module.MLP_NORM: "decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight",
        Module.GATE: "decoder.layers.{layer}.mlp.linear_fc1.weight",
        Module.UP: "decoder.layers.{layer}.mlp.linear_fc1.weight",
        Module.DOWN: "decoder.layers.{layer}.mlp.linear_fc2.weight",
        Module.FINAL_NORM: "decoder.final_layernorm.weight",
        Module.UNEMBEDDING: "output_layer.weight",
    }
)

_SHARED_NAMES = {
    Module.EMBEDDING: "model.embed_tokens.weight",
    Module.Q: "model.layers.{layer}.self_attn.q_proj.weight",
    Module.K: "model.layers.{layer}.self_attn.k_proj.weight",
    Module.V: "model.layers.{layer}.self_attn.v_proj.weight",
    Module.Q_NORM: "model.layers.{layer}.self_attn.q_norm.weight",
    Module.K_NORM: "model.layers.{layer}.self_attn.k_norm.weight",
    Module.O: "model.layers.{layer}.self_attn.o_proj.weight",
    Module.UP: "model.layers.{layer}.mlp.up_proj.weight",
    Module.DOWN: "model.layers.{layer}.mlp.down_proj.weight",
    Module.FINAL_NORM: "model.norm.weight",
    Module.UNEMBEDDING: "lm_head.weight",
}


@dataclass(frozen=True)
class Architecture:
    """A model class of transformers that computes what a ModelShape describes."""

    class_name: str
    model_type: str
    """Its name in config.json."""
    activation: str
    """Of ModelShape."""
    hidden_act: str
    """The same in config.json."""
    names: MappingProxyType[Module, str]


#: Pre-norm RMSNorm, per-head q and k RMSNorm before RoPE, no biases: both compute our very layers.
#: Apertus is published with xIELU, but its MLP takes `hidden_act`, and "gelu" is the exact GELU.
ARCHITECTURES = (
    Architecture(
        class_name="Qwen3ForCausalLM",
        model_type="qwen3",
        activation="swiglu",
        hidden_act="silu",
        names=MappingProxyType(
            {
                **_SHARED_NAMES,
                Module.GATE: "model.layers.{layer}.mlp.gate_proj.weight",
                Module.ATTENTION_NORM: "model.layers.{layer}.input_layernorm.weight",
                Module.MLP_NORM: "model.layers.{layer}.post_attention_layernorm.weight",
            }
        ),
    ),
    Architecture(
        class_name="ApertusForCausalLM",
        model_type="apertus",
        activation="gelu",
        hidden_act="gelu",
        names=MappingProxyType(
            {
                **_SHARED_NAMES,
                Module.ATTENTION_NORM: "model.layers.{layer}.attention_layernorm.weight",
                Module.MLP_NORM: "model.layers.{layer}.feedforward_layernorm.weight",
            }
        ),
    ),
)


@dataclass(frozen=True)
class ForwardMultipliers:
    """The factors in a model's forward pass that no Hugging Face config can hold."""

    residual: tuple[ResidualMultiplier, ...]
    logit: float = 1.0

    @classmethod
    def ones(cls, num_layers: int) -> ForwardMultipliers:
        """Those of a model that comes from Hugging Face."""
        return cls(
            tuple(ResidualMultiplier(layer=i, attention=1.0, mlp=1.0) for i in range(num_layers))
        )


@dataclass(frozen=True)
class TensorEntry:
    """One tensor on both sides."""

    module: Module
    layer: int | None
    """None outside the stack."""
    megatron_name: str
    """The whole tensor whose rows hold the module."""
    hf_name: str
    fold: float
    """The Hugging Face tensor is the module times this."""


def architecture_for(shape: ModelShape) -> Architecture:
    """The architecture that computes `shape`."""
    return next(item for item in ARCHITECTURES if item.activation == shape.activation)


def entries(shape: ModelShape, multipliers: ForwardMultipliers) -> Iterator[TensorEntry]:
    """Every tensor of the model, outer ones first, then layer by layer; fused ones side by side.

    Raises ConversionError for tied embeddings with a logit multiplier: the weight cannot hold it at
    one end alone.
    """
    _check_foldable(shape, multipliers)
    names = architecture_for(shape).names
    outside = [module for module in shape.modules if module in OUTSIDE_STACK]
    inside = [module for module in shape.modules if module not in OUTSIDE_STACK]
    places: list[tuple[Sequence[Module], int | None]] = [
        (outside, None),
        *((inside, layer) for layer in range(shape.num_layers)),
    ]
    for modules, layer in places:
        for module in modules:
            yield TensorEntry(
                module=module,
                layer=layer,
                megatron_name=MEGATRON_NAMES[module].format(layer=layer),
                hf_name=names[module].format(layer=layer),
                fold=_fold(module, layer, shape, multipliers),
            )


def _fold(
    module: Module, layer: int | None, shape: ModelShape, multipliers: ForwardMultipliers
) -> float:
    """The factor that moves from the forward pass into the weight of `module`.

    h + s F(h) = h + F'(h) with s in the branch's last, linear map; c q k^T / sqrt(d) with the gain
    of the q norm, RoPE being linear, against the 1 / sqrt(d) that every architecture computes.
    """
    if module is Module.UNEMBEDDING:
        return multipliers.logit
    if module is Module.Q_NORM and shape.softmax_scale is not None:
        return shape.softmax_scale * math.sqrt(shape.head_dim)
    if layer is not None and module is Module.O:
        return multipliers.residual[layer].attention
    if layer is not None and module is Module.DOWN:
        return multipliers.residual[layer].mlp
    return 1.0


def _check_foldable(shape: ModelShape, multipliers: ForwardMultipliers) -> None:
    layers = [entry.layer for entry in multipliers.residual]
    if layers != list(range(shape.num_layers)):
        raise ConversionError(
            f"residual multipliers are given for layers {layers}; expected one for each of the "
            f"{shape.num_layers} layers. The checkpoint's table is of another model."
        )
    if shape.tied_embeddings and multipliers.logit != 1:
        raise ConversionError(
            f"the embeddings are tied, and the embedding's multiplier is 1 but the logits' is "
            f"{multipliers.logit:g}: one weight cannot hold both. Only a model with untied "
            "embeddings, or with equal multipliers, can be exported."
        )
