"""What a run's sections must agree on, and the numbers derived from them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from config_samples import small_tree

from megatron_completedp.config.load import build
from megatron_completedp.config.run import RunConfig, check_world
from megatron_completedp.config.schema import keys
from megatron_completedp.core.ratios import Ratios
from megatron_completedp.errors import ConfigError


def make(**changes: Any) -> RunConfig:
    return build(RunConfig, small_tree(**changes))


def test_derived_numbers() -> None:
    config = make()
    assert config.batch_tokens == 8 * 16
    assert config.train_tokens == 12800
    assert config.steps == 100
    assert config.ratios == Ratios(m_N=2.0, m_L=2.0, m_B=2.0, m_D=2.0)


def test_a_partial_batch_is_a_step() -> None:
    """The last tokens are trained on; the duration ratio keeps the tokens asked for."""
    config = make(**{"training.train_tokens": 12801})
    assert config.steps == 101
    assert config.train_tokens == 12801


def test_steps_alone_give_the_tokens() -> None:
    config = make(**{"training.train_tokens": None, "training.train_steps": 7})
    assert config.steps == 7
    assert config.train_tokens == 7 * 128


def test_tokens_and_steps_may_agree() -> None:
    assert make(**{"training.train_steps": 100}).steps == 100


def test_without_base_every_ratio_is_exactly_one() -> None:
    assert make(base=None).ratios == Ratios()


def test_own_scale_as_base_gives_exactly_one() -> None:
    config = make()
    assert make(base=dataclasses.asdict(config.scale)).ratios == Ratios()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base.hidden_size": 0}, "base.hidden_size is 0; expected at least 1"),
        ({"base.head_dim": 16}, "use the base's head_dim"),
        ({"model.ffn_hidden_size": 256}, "model.ffn_hidden_size is 256"),
        (
            {"parallel.tensor_model_parallel_size": 3},
            "model.num_attention_heads is 8, which parallel.tensor_model_parallel_size = 3",
        ),
        (
            {"parallel.pipeline_model_parallel_size": 3},
            "model.num_layers is 4, which 3 pipeline stages",
        ),
        ({"training.train_steps": 99}, "training.train_steps is 99, but training.train_tokens"),
        ({"training.train_tokens": None}, "are both missing"),
        ({"training.train_tokens": 127}, "less than one batch of 8 x 16 tokens = 128"),
        ({"training.train_tokens": 0}, "training.train_tokens is 0; expected at least 1"),
        ({"training.micro_batch_size": 3}, "training.micro_batch_size = 3 does not divide"),
        ({"training.clip_grad": -1}, "training.clip_grad is -1.0; expected 0 (off) or more"),
        ({"training.z_loss": -1}, "training.z_loss is -1.0"),
        ({"evaluation.interval": -1}, "evaluation.interval is -1; expected at least 0"),
        ({"evaluation.samples": 0}, "evaluation.samples is 0; expected at least 1"),
        ({"checkpoint.keep_last": 0}, "checkpoint.keep_last is 0; expected at least 1"),
        ({"logging.interval": 0}, "logging.interval is 0; expected at least 1"),
        ({"seed": -1}, "seed is -1"),
        ({"data.train": ["a"], "data.train_weights": [1, 2]}, "data.train_weights has 2 entries"),
        ({"data.valid": ["a"], "data.valid_weights": [0]}, "data.valid_weights has 0.0"),
    ],
)
def test_contradictions_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make(**changes)
    assert message.lower() in str(error.value).lower()


VPP = {
    "parallel.pipeline_model_parallel_size": 2,
    "parallel.virtual_pipeline_model_parallel_size": 2,
}


@pytest.mark.parametrize(
    ("changes", "world_size", "message"),
    [
        ({"parallel.tensor_model_parallel_size": 2}, 3, "the world size is 3, which"),
        ({}, 3, "training.global_batch_size is 8; expected a multiple of 3"),
        ({}, 16, "training.global_batch_size is 8; expected a multiple of 16"),
        ({"evaluation.samples": 6}, 4, "evaluation.samples is 6; expected a multiple of 4"),
        # One microbatch per rank cannot fill a group of 2 stages.
        ({**VPP, "training.micro_batch_size": 8}, 2, "expected a multiple of 16"),
        ({**VPP, "evaluation.samples": 1}, 2, "evaluation.samples is 1; expected a multiple of 2"),
    ],
)
def test_world_that_cannot_run_it(changes: dict[str, Any], world_size: int, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_world(make(**changes), world_size)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "world_size"),
    [
        ({}, 1),
        ({}, 8),
        ({"parallel.pipeline_model_parallel_size": 2, "training.micro_batch_size": 8}, 2),
        (VPP, 8),
        # Samples do not matter when nothing is evaluated.
        ({"evaluation.interval": 0, "evaluation.samples": 1}, 8),
    ],
)
def test_world_that_can(changes: dict[str, Any], world_size: int) -> None:
    check_world(make(**changes), world_size)


def _dataclasses_below(cls: type) -> list[type]:
    below = [_dataclasses_below(entry.annotation) for entry in keys(cls) if entry.is_section]
    return [cls, *(found for group in below for found in group)]


SECTIONS = _dataclasses_below(RunConfig)


@pytest.mark.parametrize("cls", SECTIONS, ids=lambda cls: cls.__name__)
def test_sections_are_frozen_and_small(cls: type) -> None:
    assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert all(field.kw_only for field in dataclasses.fields(cls))
    # The run itself is the list of its sections, no more.
    assert len(dataclasses.fields(cls)) <= 15 or cls is RunConfig


@pytest.mark.parametrize("cls", SECTIONS, ids=lambda cls: cls.__name__)
def test_help_texts_are_found(cls: type) -> None:
    """The string under a field is its help; a parser that lost them would leave flags bare."""
    assert [entry.name for entry in keys(cls) if not entry.doc] == []


def test_a_depth_profile_belongs_to_the_base() -> None:
    """The sample has 4 layers and a base of 2; alone, a run is its own base."""
    fits = {"multipliers.depth.lr_mult": [0.5, 2]}
    own = {"multipliers.depth.lr_mult": [0.5, 1, 1, 2]}
    assert len(make(**fits).multipliers.depth.lr_mult) == 2
    assert len(make(**own, base=None).multipliers.depth.lr_mult) == 4
    with pytest.raises(ConfigError, match=r"has 4 factors; .* the base's 2 layers"):
        make(**own)
    with pytest.raises(ConfigError, match=r"has 2 factors; .* the base's 4 layers"):
        make(**fits, base=None)
