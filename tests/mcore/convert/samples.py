"""Changing the weights of an export, and comparing it with its run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_completedp.convert.export import Proof, verify_export
from megatron_completedp.convert.verify import Verification

Weights = dict[str, Tensor]
SINGLE = "model.safetensors"
LAYER = "model.layers.2."


def edit(folder: Path, change: Callable[[Weights], object]) -> None:
    weights = load_file(folder / SINGLE)
    change(weights)
    weights = {name: weight.contiguous().clone() for name, weight in weights.items()}
    save_file(weights, folder / SINGLE, metadata={"format": "pt"})


def swap(weights: Weights, one: str, other: str) -> None:
    weights[LAYER + one], weights[LAYER + other] = weights[LAYER + other], weights[LAYER + one]


def check(run: Path, folder: Path, text: Path) -> Verification:
    return verify_export(run, folder, proof=Proof(text=str(text / "held_out.txt"), samples=2))
