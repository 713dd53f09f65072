"""Hugging Face model to checkpoint: weights alone, from which training starts in any layout."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict
from itertools import count
from pathlib import Path

import torch
import yaml
from torch import Tensor

from megatron_completedp.config.load import to_tree
from megatron_completedp.convert.folder import whole_folder
from megatron_completedp.convert.hf import megatron_weights
from megatron_completedp.convert.hf_config import read_shape
from megatron_completedp.convert.mapping import ForwardMultipliers
from megatron_completedp.convert.safetensors_folder import SafetensorsReader, TensorSpec
from megatron_completedp.core.shape import ModelShape
from megatron_completedp.mcore.checkpoint_info import CONFIG_FILE, TABLE_FILE
from megatron_completedp.mcore.weights import save_weights


def from_hf(hf_folder: Path, out: Path, *, vocab_multiple: int = 128) -> ModelShape:
    """Write the Hugging Face model in `hf_folder` as the checkpoint `out`; returns its shape.

    Weights keep their dtype, bit for bit; every multiplier of the forward pass is 1, and padded
    vocabulary rows are those of `megatron_weights`. A run starts from it with
    `training.start_from: out`. Needs `initialize_parallel` in a single process.

    Memory: one weight. The rest is in files beside `out`, mapped into memory, which the operating
    system writes back when it needs room.

    Raises ConversionError when `out` is not empty or cannot be written, and when the model is not
    whole, mixes dtypes or is of another architecture.
    """
    with whole_folder(out) as folder:
        shape = read_shape(hf_folder, vocab_multiple=vocab_multiple)
        reader = SafetensorsReader(hf_folder)
        multipliers = ForwardMultipliers.ones(shape.num_layers)
        table = {
            "residual": [asdict(entry) for entry in multipliers.residual],
            "logit_multiplier": multipliers.logit,
        }
        config = yaml.safe_dump({"model": to_tree(shape)}, sort_keys=False)
        (folder / TABLE_FILE).write_text(json.dumps(table, indent=1), encoding="utf-8")
        (folder / CONFIG_FILE).write_text(config, encoding="utf-8")
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-") as room:
            weights = megatron_weights(shape, reader, _Mapped(Path(room)))
            save_weights(folder, weights, shape.num_layers)
    return shape


class _Mapped:
    """Room for tensors in files of their own, so that they need not fit into memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = count()

    def __call__(self, spec: TensorSpec) -> Tensor:
        path = self._folder / str(next(self._numbers))
        with path.open("wb") as file:
            # Else a full disk shows when a page is written, and that kills the process by SIGBUS.
            os.posix_fallocate(file.fileno(), 0, spec.bytes)
        size = spec.bytes // spec.dtype.itemsize
        return torch.from_file(str(path), shared=True, size=size, dtype=spec.dtype).view(spec.shape)
