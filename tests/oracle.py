"""The slow-and-plain side of every comparison: a GPT in plain PyTorch, free of Megatron.

It has the architecture of `ModelShape` with residual multipliers per layer and branch, z-loss and a
logit multiplier. Written for speed as well, because a benchmark holds the engine's step to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from megatron_completedp.core.hyperparams import ResidualMultiplier
from megatron_completedp.core.shape import ModelShape


class Layer(nn.Module):
    """h + a * attention(norm(h)), then h + m * mlp(norm(h)); [batch, sequence, hidden]."""

    def __init__(self, shape: ModelShape, multiplier: ResidualMultiplier) -> None:
        super().__init__()
        self.shape, self.multiplier = shape, multiplier
        heads, groups, head_dim = shape.num_attention_heads, shape.kv_heads, shape.head_dim
        self.split_sizes = [heads * head_dim, groups * head_dim, groups * head_dim]
        self.attention_norm = nn.RMSNorm(shape.hidden_size, eps=shape.norm_epsilon)
        self.qkv = nn.Linear(shape.hidden_size, sum(self.split_sizes), bias=False)
        self.q_norm = nn.RMSNorm(head_dim, eps=shape.norm_epsilon)
        self.k_norm = nn.RMSNorm(head_dim, eps=shape.norm_epsilon)
        self.o = nn.Linear(heads * head_dim, shape.hidden_size, bias=False)
        self.mlp_norm = nn.RMSNorm(shape.hidden_size, eps=shape.norm_epsilon)
        rows = shape.ffn_hidden_size * (2 if shape.gated else 1)
        self.gate_up = nn.Linear(shape.hidden_size, rows, bias=False)
        self.down = nn.Linear(shape.ffn_hidden_size, shape.hidden_size, bias=False)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = torch.add(
            h, self.attention(self.attention_norm(h), cos, sin), alpha=self.multiplier.attention
        )
        return torch.add(h, self.mlp(self.mlp_norm(h)), alpha=self.multiplier.mlp)

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shape = self.shape
        q, k, v = (
            part.unflatten(-1, (-1, shape.head_dim))
            for part in self.qkv(x).split(self.split_sizes, dim=-1)
        )
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        context = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
            scale=shape.softmax_scale,
            enable_gqa=shape.kv_heads != shape.num_attention_heads,
        )
        return self.o(context.transpose(1, 2).flatten(2))

    def mlp(self, x: Tensor) -> Tensor:
        hidden = self.gate_up(x)
        if not self.shape.gated:
            return self.down(F.gelu(hidden))
        gate, up = hidden.chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class PlainGPT(nn.Module):
    """The whole model. `forward(tokens, labels)` returns the mean loss and the mean plain CE."""

    def __init__(
        self,
        shape: ModelShape,
        residual: Sequence[ResidualMultiplier],
        *,
        z_loss: float = 0.0,
        logit_multiplier: float = 1.0,
    ) -> None:
        super().__init__()
        self.shape, self.z_loss, self.logit_multiplier = shape, z_loss, logit_multiplier
        self.embedding = nn.Embedding(shape.padded_vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape, multiplier) for multiplier in residual)
        self.final_norm = nn.RMSNorm(shape.hidden_size, eps=shape.norm_epsilon)
        self.unembedding = nn.Linear(shape.hidden_size, shape.padded_vocab_size, bias=False)
        if shape.tied_embeddings:
            self.unembedding.weight = self.embedding.weight
        cos, sin = rotary_tables(shape)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def logits(self, tokens: Tensor) -> Tensor:
        """[batch, sequence] ids -> [batch, sequence, padded vocabulary]."""
        h = self.embedding(tokens)
        for layer in self.layers:
            h = layer(h, self.cos, self.sin)
        logits = self.unembedding(self.final_norm(h))
        return logits if self.logit_multiplier == 1 else logits * self.logit_multiplier

    def forward(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(tokens)
        if self.z_loss == 0:
            cross_entropy = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
            return cross_entropy, cross_entropy.detach()
        log_z = torch.logsumexp(logits, dim=-1)
        cross_entropy = (log_z - logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)).mean()
        return cross_entropy + self.z_loss * log_z.square().mean(), cross_entropy.detach()

    def load_from_megatron(self, state: Mapping[str, Tensor]) -> None:
        """Copy whole (TP = PP = 1) Megatron weights; every parameter must be among them."""
        keys = self.load_state_dict(from_megatron(self.shape, state), strict=False)
        assert not keys.missing_keys or self.shape.tied_embeddings, keys.missing_keys
        assert not keys.unexpected_keys, keys.unexpected_keys


def rotary_tables(shape: ModelShape) -> tuple[Tensor, Tensor]:
    """Cos and sin of position * base^(-2i / head_dim), [sequence, 1, head_dim], repeated halves."""
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    angles = torch.outer(
        torch.arange(shape.seq_length, dtype=torch.float32), 1.0 / shape.rotary_base**exponents
    )
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + head_dim / 2) of [batch, sequence, heads, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def from_megatron(shape: ModelShape, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Megatron's whole tensors (weights or gradients) under PlainGPT's names.

    Only `linear_qkv` changes its layout: Megatron stores, per query group, that group's q heads and
    then its k and v head; PlainGPT stores all q, all k, all v.
    """
    renamed = {}
    for name, tensor in state.items():
        outer, _, tail = name.partition("decoder.layers.")
        if outer or not tail:
            renamed[_OUTER_NAMES[name]] = tensor
            continue
        layer, _, tail = tail.partition(".")
        if tail == "self_attention.linear_qkv.weight":
            per_group = shape.num_attention_heads // shape.kv_heads
            grouped = tensor.view(shape.kv_heads, per_group + 2, shape.head_dim, -1)
            q, k, v = grouped.split([per_group, 1, 1], dim=1)
            tensor = torch.cat([part.flatten(0, 2) for part in (q, k, v)])
        renamed[f"layers.{layer}.{_LAYER_NAMES[tail]}"] = tensor
    return renamed


_OUTER_NAMES = {
    "embedding.word_embeddings.weight": "embedding.weight",
    "decoder.final_layernorm.weight": "final_norm.weight",
    "output_layer.weight": "unembedding.weight",
}
_LAYER_NAMES = {
    "input_layernorm.weight": "attention_norm.weight",
    "self_attention.linear_qkv.weight": "qkv.weight",
    "self_attention.q_layernorm.weight": "q_norm.weight",
    "self_attention.k_layernorm.weight": "k_norm.weight",
    "self_attention.linear_proj.weight": "o.weight",
    "pre_mlp_layernorm.weight": "mlp_norm.weight",
    "mlp.linear_fc1.weight": "gate_up.weight",
    "mlp.linear_fc2.weight": "down.weight",
}


def megatron_weights(shape: ModelShape, seed: int = 0) -> dict[str, Tensor]:
    """Whole random weights under Megatron's names, the same in every process.

    Matrices have entries of std 1/sqrt(fan_in), gains lie around 1, so that every term of the model
    matters to its loss and no gradient vanishes.
    """
    hidden, ffn, head_dim = shape.hidden_size, shape.ffn_hidden_size, shape.head_dim
    queries = shape.num_attention_heads * head_dim
    sizes: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (shape.padded_vocab_size, hidden)
    }
    for layer in range(shape.num_layers):
        for tail, size in {
            "input_layernorm.weight": (hidden,),
            "self_attention.linear_qkv.weight": (queries + 2 * shape.kv_heads * head_dim, hidden),
            "self_attention.q_layernorm.weight": (head_dim,),
            "self_attention.k_layernorm.weight": (head_dim,),
            "self_attention.linear_proj.weight": (hidden, queries),
            "pre_mlp_layernorm.weight": (hidden,),
            "mlp.linear_fc1.weight": (ffn * (2 if shape.gated else 1), hidden),
            "mlp.linear_fc2.weight": (hidden, ffn),
        }.items():
            sizes[f"decoder.layers.{layer}.{tail}"] = size
    sizes["decoder.final_layernorm.weight"] = (hidden,)
    if not shape.tied_embeddings:
        sizes["output_layer.weight"] = (shape.padded_vocab_size, hidden)
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(size, generator=generator) / math.sqrt(size[-1])
        if len(size) == 2
        else 1 + 0.2 * torch.randn(size, generator=generator)
        for name, size in sizes.items()
    }
