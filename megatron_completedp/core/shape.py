"""The shape of a decoder-only model, and how many parameters each of its modules has."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_completedp.core.roles import OUTSIDE_STACK, Module
from megatron_completedp.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A pre-norm RMSNorm decoder with QK norm, RoPE and no biases (sizes in elements)."""

    num_layers: int
    """Transformer layers; each has two residual branches."""
    hidden_size: int
    """Width N of the residual stream."""
    ffn_hidden_size: int
    """Width of the MLP's hidden layer; grows in proportion to hidden_size."""
    num_attention_heads: int
    """Query heads; width grows by adding heads at a fixed head_dim."""
    head_dim: int
    """Size of one head (Megatron's kv_channels); a constant along a ladder."""
    vocab_size: int
    """Token ids the tokenizer can produce."""
    seq_length: int
    """Tokens in one training sequence."""
    num_query_groups: int | None = None
    """Key/value heads (GQA); none means one per query head."""
    activation: Literal["swiglu", "gelu"] = "swiglu"
    """MLP non-linearity; swiglu has a gate, gelu has none."""
    tied_embeddings: bool = False
    """Share one weight between embedding and unembedding (needs rules that agree on it)."""
    vocab_multiple: int = 128
    """The vocabulary is padded to a multiple of this, the same for every parallel layout."""
    rotary_base: int = 10000
    """Base of the rotary position embedding."""
    norm_epsilon: float = 1e-5
    """Added to the mean square in every RMSNorm."""
    softmax_scale: float | None = None
    """Attention logits are multiplied by this; none means 1/sqrt(head_dim)."""

    def __post_init__(self) -> None:
        for name in (
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "head_dim",
            "vocab_size",
            "seq_length",
            "vocab_multiple",
            "rotary_base",
        ):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"model.{name} is {value}; expected at least 1.")
        for name in ("norm_epsilon", "softmax_scale"):
            number = getattr(self, name)
            if number is not None and not 0 < number < math.inf:
                raise ConfigError(f"model.{name} is {number}; expected a positive number.")
        if self.activation not in ("swiglu", "gelu"):
            raise ConfigError(
                f"model.activation is {self.activation!r}; expected one of swiglu, gelu."
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"model.head_dim is {self.head_dim}; rotary embeddings need an even size."
            )
        groups = self.num_query_groups
        if groups is not None and (groups < 1 or self.num_attention_heads % groups):
            raise ConfigError(
                f"model.num_query_groups is {groups}, which does not divide "
                f"model.num_attention_heads = {self.num_attention_heads}; choose a divisor of it."
            )

    @property
    def kv_heads(self) -> int:
        """Key/value heads: num_query_groups, or one per query head."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate beside its up projection."""
        return self.activation == "swiglu"

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up to a multiple of vocab_multiple."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def modules(self) -> tuple[Module, ...]:
        """The modules that exist in this model, in forward order."""
        absent = set()
        if not self.gated:
            absent.add(Module.GATE)
        if self.tied_embeddings:
            absent.add(Module.UNEMBEDDING)
        return tuple(module for module in Module if module not in absent)

    def module_parameters(self, module: Module) -> int:
        """Elements of one instance of `module` (one layer's worth inside the stack)."""
        hidden, head_dim = self.hidden_size, self.head_dim
        sizes = {
            Module.EMBEDDING: self.padded_vocab_size * hidden,
            Module.ATTENTION_NORM: hidden,
            Module.Q: self.num_attention_heads * head_dim * hidden,
            Module.K: self.kv_heads * head_dim * hidden,
            Module.V: self.kv_heads * head_dim * hidden,
            Module.Q_NORM: head_dim,
            Module.K_NORM: head_dim,
            Module.O: self.num_attention_heads * head_dim * hidden,
            Module.MLP_NORM: hidden,
            Module.GATE: self.ffn_hidden_size * hidden,
            Module.UP: self.ffn_hidden_size * hidden,
            Module.DOWN: self.ffn_hidden_size * hidden,
            Module.FINAL_NORM: hidden,
            Module.UNEMBEDDING: self.padded_vocab_size * hidden,
        }
        return sizes[module]

    @property
    def parameters(self) -> int:
        """Elements of the whole model, the padded vocabulary included."""
        return sum(
            self.module_parameters(module) * (1 if module in OUTSIDE_STACK else self.num_layers)
            for module in self.modules
        )
