"""A run moved along one axis, with the run it came from as what it was tuned at."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

from megatron_completedp.config.run import RunConfig
from megatron_completedp.errors import ConfigError

Axis = Literal["width", "depth", "batch", "duration"]


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
