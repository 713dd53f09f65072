"""`config.json` and `generation_config.json`, and the ModelShape that a config describes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from megatron_completedp.convert.mapping import ARCHITECTURES, Architecture, architecture_for
from megatron_completedp.core.shape import ModelShape
from megatron_completedp.errors import ConversionError

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"


def model_config(shape: ModelShape) -> dict[str, Any]:
    """What the config of the Hugging Face model says of layers like those of `shape`."""
    architecture = architecture_for(shape)
    return {
        "model_type": architecture.model_type,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": architecture.hidden_act,
        "max_position_embeddings": shape.seq_length,
        "rms_norm_eps": shape.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(shape.rotary_base)},
        "tie_word_embeddings": shape.tied_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
    }


def write_config(folder: Path, shape: ModelShape, *, dtype: torch.dtype, eod: int) -> None:
    """Write both files. `eod` ends a text and, as in training, marks where one begins."""
    config = {
        "architectures": [architecture_for(shape).class_name],
        **model_config(shape),
        # Read by transformers 4, which does not know rope_parameters.
        "rope_theta": float(shape.rotary_base),
        "rope_scaling": None,
        "bos_token_id": eod,
        "eos_token_id": eod,
        "pad_token_id": None,
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    _write(folder / CONFIG_FILE, config)
    # Documents are packed as text, eod, text, ...: before a first token there was always an eod.
    _write(
        folder / GENERATION_FILE, {"bos_token_id": eod, "eos_token_id": eod, "pad_token_id": eod}
    )


def read_shape(folder: Path, *, vocab_multiple: int) -> ModelShape:
    """The shape of the Hugging Face model in `folder`.

    Raises ConversionError when the config is of another architecture, or says something that these
    layers do not compute.
    """
    path = folder / CONFIG_FILE
    try:
        config: dict[str, Any] = json.loads(path.read_bytes())
        architecture = _architecture(config)
        _check_supported(config, architecture)
        rope = config.get("rope_parameters") or {"rope_theta": config["rope_theta"]}
        return ModelShape(
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            ffn_hidden_size=config["intermediate_size"],
            num_attention_heads=config["num_attention_heads"],
            num_query_groups=config.get("num_key_value_heads"),
            head_dim=_head_dim(config),
            vocab_size=config["vocab_size"],
            seq_length=config["max_position_embeddings"],
            activation=architecture.activation,  # type: ignore[arg-type]
            tied_embeddings=config.get("tie_word_embeddings", False),
            vocab_multiple=vocab_multiple,
            rotary_base=int(rope["rope_theta"]),
            norm_epsilon=config["rms_norm_eps"],
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConversionError(
            f"{path} is missing, garbled or incomplete ({error!r}); copy the model again."
        ) from error


def _architecture(config: dict[str, Any]) -> Architecture:
    for architecture in ARCHITECTURES:
        if config.get("model_type") == architecture.model_type:
            return architecture
    known = ", ".join(f"{item.model_type} ({item.class_name})" for item in ARCHITECTURES)
    raise ConversionError(
        f"model_type is {config.get('model_type')!r}; expected one of {known}. Other architectures "
        "compute other layers, which this model has not."
    )


def _head_dim(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _check_supported(config: dict[str, Any], architecture: Architecture) -> None:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", config.get("rope_theta"))
    found_and_expected = {
        "hidden_act": (config.get("hidden_act"), architecture.hidden_act),
        "attention_bias": (config.get("attention_bias", False), False),
        "use_sliding_window": (config.get("use_sliding_window", False), False),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
        "rope_theta": (theta, theta and int(theta)),
    }
    for name, (found, expected) in found_and_expected.items():
        if found != expected:
            raise ConversionError(
                f"{name} is {found!r}; expected {expected!r}, which is all that these layers "
                f"compute. This {architecture.class_name} cannot be converted."
            )


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
