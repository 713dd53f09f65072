"""The smallest model that trains in a second, as a mapping of YAML."""

from __future__ import annotations

from typing import Any

TINY_MODEL: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_attention_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
    "seq_length": 64,
}
