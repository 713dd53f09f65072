"""The models that the checks measure: a base, and the same base moved along one axis."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from megatron_completedp.check.expected import Axis
from megatron_completedp.config.load import load_config
from megatron_completedp.config.run import RunConfig
from megatron_completedp.config.sections import TrainingConfig
from megatron_completedp.core.hyperparams import BaseHyperparams
from megatron_completedp.core.multipliers import Multipliers
from megatron_completedp.core.shape import ModelShape
from megatron_completedp.core.tables import Parametrization
from megatron_completedp.errors import ConfigError


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


def moved(base: RunConfig, axis: Axis, ratio: float) -> RunConfig:
    """`base` at `ratio` times its size along `axis`, with `base` as what it was tuned at.

    Width grows by heads at a fixed head_dim. Raises ConfigError where the ratio leaves no whole
    number of heads, layers or sequences.
    """

    def times(name: str, value: int) -> int:
        whole = round(value * ratio)
        if not math.isclose(value * ratio, whole):  # 96 * (320 / 96) may miss 320 by rounding
            raise ConfigError(
                f"{axis} x {ratio:g} turns {name} = {value} into {value * ratio:g}; expected a "
                "whole number. Choose other ratios or another base."
            )
        return whole

    model, training = base.model, base.training
    if axis == "width":
        model = replace(
            model,
            hidden_size=times("hidden_size", model.hidden_size),
            ffn_hidden_size=times("ffn_hidden_size", model.ffn_hidden_size),
            num_attention_heads=times("num_attention_heads", model.num_attention_heads),
            num_query_groups=model.num_query_groups
            and times("num_query_groups", model.num_query_groups),
        )
    elif axis == "depth":
        model = replace(model, num_layers=times("num_layers", model.num_layers))
    elif axis == "batch":
        size = times("global_batch_size", training.global_batch_size)
        micro = math.gcd(size, training.micro_batch_size)
        training = replace(training, global_batch_size=size, micro_batch_size=micro)
    tokens = times("train_tokens", base.train_tokens) if axis == "duration" else base.train_tokens
    training = replace(training, train_tokens=tokens, train_steps=None)
    return replace(base, base=base.base or base.scale, model=model, training=training)
