"""A small valid run for the config tests, and ways to spoil it."""

from __future__ import annotations

import copy
from typing import Any

#: 4 layers on 8 x 16 = 128 tokens per step for 100 steps; twice as wide as its base.
_TREE: dict[str, Any] = {
    "run_dir": "runs/small",
    "parametrization": "completedp",
    "base": {
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 4,
        "head_dim": 8,
        "num_layers": 2,
        "batch_tokens": 64,
        "train_tokens": 6400,
    },
    "hyperparams": {"lr": 0.01},
    "model": {
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 128,
        "num_attention_heads": 8,
        "head_dim": 8,
        "vocab_size": 500,
        "seq_length": 16,
    },
    "training": {"global_batch_size": 8, "train_tokens": 12800},
}


def small_tree(**changes: Any) -> dict[str, Any]:
    """The sample with values replaced: `small_tree(**{"model.num_layers": 6})`."""
    tree = copy.deepcopy(_TREE)
    for path, value in changes.items():
        *sections, name = path.split(".")
        parent = tree
        for section in sections:
            parent = parent.setdefault(section, {})
        parent[name] = value
    return tree
