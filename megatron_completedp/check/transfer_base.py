"""The base run of `check transfer` when none is given: a minute of CPU on text found anywhere."""

from __future__ import annotations

from pathlib import Path

from megatron_completedp.config.run import RunConfig
from megatron_completedp.config.sections import DataConfig, EvalConfig, TrainingConfig
from megatron_completedp.core.hyperparams import BaseHyperparams
from megatron_completedp.core.schedule import Schedule
from megatron_completedp.core.shape import ModelShape
from megatron_completedp.data.quick import QuickSettings, quick


def small_base(data: Path) -> RunConfig:
    """Width 32, 2 layers, 0.1M tokens of the Python installation's text, put into `data`.

    The hyperparameters are near the best of this shape. The stds give activations of unit size.
    """
    quick(data, QuickSettings(max_mb=1.0, valid_mb=0.1, vocab_size=512))
    return RunConfig(
        run_dir=str(data.parent),
        model=ModelShape(
            num_layers=2,
            hidden_size=32,
            ffn_hidden_size=96,
            num_attention_heads=2,
            head_dim=16,
            vocab_size=512,
            seq_length=64,
        ),
        hyperparams=BaseHyperparams(
            lr=0.03,
            weight_decay=0.1,
            beta1=0.8,
            embedding_init_std=1.0,
            hidden_init_std=32**-0.5,
            unembedding_init_std=0.1,
        ),
        schedule=Schedule(warmup_fraction=0.05),
        training=TrainingConfig(
            global_batch_size=8, micro_batch_size=8, train_tokens=100_000, device="cpu"
        ),
        evaluation=EvalConfig(samples=256),
        data=DataConfig(
            train=(str(data / "train"),),
            valid=(str(data / "valid"),),
            tokenizer=str(data / "tokenizer.model"),
        ),
    )
