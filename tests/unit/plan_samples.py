"""The model whose memory and traffic the tests of planning work out by hand."""

from __future__ import annotations

from megatron_completedp.core.shape import ModelShape

SHAPE = ModelShape(
    num_layers=8,
    hidden_size=128,
    ffn_hidden_size=352,
    num_attention_heads=4,
    head_dim=32,
    vocab_size=512,
    seq_length=64,
)
