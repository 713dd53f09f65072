"""A trained checkpoint, a tokenizer and held-out text, small enough to convert in a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from megatron_completedp.config.parallel import ParallelConfig
from megatron_completedp.config.run import RunConfig
from megatron_completedp.config.sections import DataConfig
from megatron_completedp.convert.export import Proof, to_hf
from megatron_completedp.convert.hf import write_hf_weights
from megatron_completedp.convert.mapping import MEGATRON_NAMES, ForwardMultipliers
from megatron_completedp.convert.verify import Verification
from megatron_completedp.core.multipliers import Multipliers
from megatron_completedp.core.roles import Module
from megatron_completedp.core.shape import ModelShape
from megatron_completedp.core.tables import Rules
from megatron_completedp.data.tokenizer import train_sentencepiece
from megatron_completedp.mcore.parallel import initialize_parallel
from megatron_completedp.mcore.platform import CpuPlatform
from megatron_completedp.mcore.store import checkpoint_path
from megatron_completedp.mcore.weights import WeightReader
from tests.mcore.engine_runs import run_config, run_engine

VOCAB_SIZE = 350
STEPS = 2
#: A run whose multipliers are all 1.
PLAIN: dict[str, Any] = {"rules": Rules(parametrization="sp"), "multipliers": Multipliers()}
_WORDS = "the model reads some real text and says which token it thinks comes next"
TEXT = "\n".join(
    f"{number}: {_WORDS} {_WORDS.upper()}  {number * 7919} (caf\u00e9, 2 * {number})."
    for number in range(40)
)


def make_text(folder: Path) -> Path:
    """tokenizer.model and held_out.txt in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    train_sentencepiece([TEXT], VOCAB_SIZE, folder / "tokenizer.model")
    (folder / "held_out.txt").write_text(TEXT, encoding="utf-8")
    return folder


def convert_config(
    folder: Path, parallel: ParallelConfig | None = None, **changes: Any
) -> RunConfig:
    """A run with multipliers that all differ, whose vocabulary is padded from 350 to 384."""
    model = {"vocab_size": VOCAB_SIZE, "seq_length": 48, **changes.pop("model", {})}
    data = DataConfig(tokenizer=str(folder / "tokenizer.model"))
    return run_config(parallel, model=model, data=data, **changes)


def train(config: RunConfig, run_dir: Path, inspect: Any = None) -> Path:
    """Train a few steps; the run folder, whose checkpoint they are in."""
    run_engine(config, stop_at=STEPS, save_to=run_dir / "checkpoints", inspect=inspect)
    assert checkpoint_path(run_dir / "checkpoints", STEPS).is_dir()
    return run_dir


def export(run_dir: Path, text: Path, out: Path, **changes: Any) -> Verification:
    """Convert and verify on the held-out text."""
    proof = Proof(text=str(text / "held_out.txt"))
    verification = to_hf(run_dir, out, **{"proof": proof, **changes})
    assert verification is not None
    return verification


def large_shape() -> ModelShape:
    """75 MB in fp32, of which no tensor is large."""
    return ModelShape(
        num_layers=24,
        hidden_size=256,
        ffn_hidden_size=704,
        num_attention_heads=4,
        head_dim=64,
        vocab_size=1000,
        seq_length=64,
    )


def streamed_export(checkpoint: Path, out: Path) -> None:
    """Convert a checkpoint of `large_shape` to files of 6 MB; prints their sizes and the memory.

    For a process of its own, whose peak is not that of another test.
    """
    initialize_parallel(CpuPlatform(), ParallelConfig(), timeout_s=60, seed=1)
    shape, reader = large_shape(), WeightReader(checkpoint)
    reader.read(MEGATRON_NAMES[Module.FINAL_NORM])  # what a first read imports is not the export's
    before = CpuPlatform().peak_memory_bytes()
    ones = ForwardMultipliers.ones(shape.num_layers)
    write_hf_weights(
        out, shape, ones, dtype=torch.float32, max_shard_bytes=6_000_000, read=reader.read
    )
    sizes = [path.stat().st_size for path in out.glob("*.safetensors")]
    grown = CpuPlatform().peak_memory_bytes() - before
    print(json.dumps({"files": len(sizes), "largest_file": max(sizes), "grown": grown}))
