"""The Megatron model against plain PyTorch: loss and every gradient, in one process."""

from __future__ import annotations

import math

import pytest
import torch
from megatron.core.transformer import TransformerConfig

from megatron_completedp.config.parallel import ParallelConfig
from megatron_completedp.core.hyperparams import ResidualMultiplier
from megatron_completedp.core.shape import ModelShape
from megatron_completedp.errors import ConfigError
from megatron_completedp.mcore.model import (
    LanguageModel,
    Precision,
    build_model,
    check_transformer_config,
    transformer_config,
)
from megatron_completedp.mcore.platform import Platform
from tests.mcore.common import (
    LOGIT_MULTIPLIER,
    Z_LOSS,
    batch,
    gradients_of,
    largest_error,
    load_whole_weights,
    oracle_step,
    tiny_shape,
    uneven_residual,
)
from tests.oracle import PlainGPT, megatron_weights

# Two fp32 programs that sum in different orders: each tensor agrees to some roundings of 6e-8,
# grown by four layers. Seen: 1e-6.
TOLERANCE = 1e-5

SHAPES = {
    "gqa_swiglu": tiny_shape(),
    "mha_swiglu": tiny_shape(num_query_groups=None),
    "gqa_gelu": tiny_shape(activation="gelu"),
    "head_dim_64": tiny_shape(head_dim=64, num_attention_heads=2, num_query_groups=1),
    "tied": tiny_shape(tied_embeddings=True),
    "softmax_scale": tiny_shape(softmax_scale=1 / 32),
}


def build(
    platform: Platform,
    shape: ModelShape,
    residual: list[ResidualMultiplier] | None = None,
    *,
    z_loss: float = Z_LOSS,
    logit_multiplier: float = LOGIT_MULTIPLIER,
    precision: Precision = "fp32",
) -> LanguageModel:
    (model,) = build_model(
        shape,
        ParallelConfig(),
        platform=platform,
        precision=precision,
        residual=residual or uneven_residual(shape.num_layers),
        z_loss=z_loss,
        logit_multiplier=logit_multiplier,
    )
    load_whole_weights(model, shape)
    return model


def train_loss(model: LanguageModel, shape: ModelShape) -> torch.Tensor:
    tokens, labels = batch(shape)
    return model(tokens, position_ids=None, attention_mask=None, labels=labels).mean()


@pytest.mark.parametrize("name", SHAPES)
def test_loss_and_gradients_equal_plain_pytorch(platform: Platform, name: str) -> None:
    shape = SHAPES[name]
    model = build(platform, shape)
    loss = train_loss(model, shape)
    loss.backward()
    expected_loss, expected_ce, expected = oracle_step(shape, uneven_residual(shape.num_layers))
    assert loss.item() == pytest.approx(expected_loss, rel=TOLERANCE)
    assert model.cross_entropy.mean().item() == pytest.approx(expected_ce, rel=TOLERANCE)
    assert largest_error(shape, gradients_of(model), expected) < TOLERANCE


@pytest.mark.parametrize("mistake", ["no_z_loss", "no_logit_multiplier", "swapped_branches"])
def test_comparison_notices_a_dropped_factor(platform: Platform, mistake: str) -> None:
    shape = tiny_shape()
    residual = uneven_residual(shape.num_layers)
    if mistake == "swapped_branches":
        residual[0] = ResidualMultiplier(
            layer=0, attention=residual[0].mlp, mlp=residual[0].attention
        )
    model = build(
        platform,
        shape,
        residual,
        z_loss=0.0 if mistake == "no_z_loss" else Z_LOSS,
        logit_multiplier=1.0 if mistake == "no_logit_multiplier" else LOGIT_MULTIPLIER,
    )
    loss = train_loss(model, shape)
    loss.backward()
    expected_loss, _, expected = oracle_step(shape, uneven_residual(shape.num_layers))
    assert loss.item() != pytest.approx(expected_loss, rel=100 * TOLERANCE)
    assert largest_error(shape, gradients_of(model), expected) > 100 * TOLERANCE


def test_bf16_stays_near_fp32(platform: Platform) -> None:
    shape = tiny_shape()
    model = build(platform, shape, precision="bf16")
    loss = train_loss(model, shape)
    loss.backward()
    expected_loss, _, expected = oracle_step(shape, uneven_residual(shape.num_layers))
    assert loss.dtype == torch.float32
    # bf16 rounds to 2^-9; some twenty roundings on the way to a gradient add up to a few percent.
    assert loss.item() == pytest.approx(expected_loss, rel=5e-3)
    gradients = {name: grad.float() for name, grad in gradients_of(model).items()}
    assert largest_error(shape, gradients, expected) < 0.1


def test_evaluation_returns_the_plain_cross_entropy(platform: Platform) -> None:
    shape = tiny_shape()
    model = build(platform, shape)
    train = train_loss(model, shape).item()
    evaluated = train_loss(model.eval(), shape).item()
    expected_loss, expected_ce, _ = oracle_step(shape, uneven_residual(shape.num_layers))
    assert train == pytest.approx(expected_loss, rel=TOLERANCE)
    assert evaluated == pytest.approx(expected_ce, rel=TOLERANCE)
    assert expected_loss > expected_ce * 1.01


def test_logits_carry_the_multiplier(platform: Platform) -> None:
    shape = tiny_shape()
    residual = uneven_residual(shape.num_layers)
    tokens, _ = batch(shape)
    model = build(platform, shape)
    oracle = PlainGPT(shape, residual, logit_multiplier=LOGIT_MULTIPLIER)
    oracle.load_from_megatron(megatron_weights(shape))
    logits = model(tokens, position_ids=None, attention_mask=None)
    torch.testing.assert_close(logits, oracle.logits(tokens), rtol=1e-4, atol=1e-5)


def test_new_weights_are_nan_until_initialized(platform: Platform) -> None:
    shape = tiny_shape()
    (model,) = build_model(
        shape,
        ParallelConfig(),
        platform=platform,
        precision="bf16",
        residual=uneven_residual(shape.num_layers),
    )
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        if parameter.dim() == 2:
            assert parameter.isnan().all(), name
            assert parameter.tensor_model_parallel, name
        else:
            assert (parameter == 1).all(), name
    assert math.isnan(train_loss(model, shape).item())


def test_meta_model_has_the_real_ones_names_and_shapes(platform: Platform) -> None:
    shape = tiny_shape()
    real = build(platform, shape)
    (meta,) = build_model(
        shape,
        ParallelConfig(),
        platform=platform,
        precision="fp32",
        residual=uneven_residual(shape.num_layers),
        device=torch.device("meta"),
    )

    def describe(model: LanguageModel) -> list[tuple[object, ...]]:
        return [
            (name, p.shape, p.dtype, getattr(p, "partition_dim", None))
            for name, p in model.named_parameters()
        ]

    assert describe(meta) == describe(real)
    assert all(parameter.is_meta for parameter in meta.parameters())
    assert sum(parameter.numel() for parameter in meta.parameters()) == shape.parameters


def test_megatrons_own_mup_is_refused() -> None:
    config = transformer_config(tiny_shape(), ParallelConfig(), precision="fp32")
    check_transformer_config(config)
    config.use_mup = True
    with pytest.raises(ConfigError, match="use_mup is True"):
        check_transformer_config(config)


@pytest.mark.parametrize(("field", "value"), [("hidden_dropout", 0.1), ("add_bias_linear", True)])
def test_configs_the_layers_do_not_compute_are_refused(field: str, value: object) -> None:
    config: TransformerConfig = transformer_config(tiny_shape(), ParallelConfig(), precision="fp32")
    setattr(config, field, value)
    with pytest.raises(ConfigError, match=field):
        check_transformer_config(config)


def test_residual_multipliers_must_name_every_layer(platform: Platform) -> None:
    with pytest.raises(ConfigError, match="in order from 0"):
        build(platform, tiny_shape(), uneven_residual(3))


@pytest.mark.parametrize("bad", [{"z_loss": -1.0}, {"logit_multiplier": 0.0}])
def test_bad_loss_settings_are_refused(platform: Platform, bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        build(platform, tiny_shape(), **bad)
