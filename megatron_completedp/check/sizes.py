"""The base that the checks measure: the user's run, or a small one that is built in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_completedp.config.load import load_config
from megatron_completedp.config.run import RunConfig
from megatron_completedp.config.sections import TrainingConfig
from megatron_completedp.core.hyperparams import BaseHyperparams
from megatron_completedp.core.multipliers import Multipliers
from megatron_completedp.core.shape import ModelShape
from megatron_completedp.core.tables import Parametrization


def base_run(run: str | None, parametrization: Parametrization | None = None) -> RunConfig:
    """The run in the YAML file at `run`, or the built-in base; by other rules where given."""
    base = small_base() if run is None else load_config(Path(run))
    if parametrization is None:
        return base
    return replace(base, rules=replace(base.rules, parametrization=parametrization))


def small_base() -> RunConfig:
    """The base for a laptop: width 64, 2 layers, 0.1M parameters.

    Init stds are those of unit-size activations: 1, 1/sqrt(fan-in) and 1/fan-in at width 64. The
    branches together add less to the residual stream than the embedding puts there, so that what
    they add at random, which the depth rule lets vanish, is small at two layers already.
    """
    return RunConfig(
        run_dir="unused",
        model=ModelShape(
            num_layers=2,
            hidden_size=64,
            ffn_hidden_size=128,
            num_attention_heads=4,
            head_dim=16,
            vocab_size=128,
            seq_length=32,
        ),
        hyperparams=BaseHyperparams(
            lr=2**-8,
            weight_decay=0.1,
            gain_weight_decay=0.1,
            eps=1e-12,
            embedding_init_std=1.0,
            hidden_init_std=1 / 8,
            unembedding_init_std=1 / 64,
        ),
        multipliers=Multipliers(attention_residual_mult=0.25, mlp_residual_mult=0.25),
        training=TrainingConfig(global_batch_size=8, micro_batch_size=8, train_steps=20, z_loss=0),
    )
