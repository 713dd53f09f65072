"""Start a run from the weights of a checkpoint: its optimizer, schedule and step stay fresh."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_completedp.config.load import build, read_yaml
from megatron_completedp.core.shape import ModelShape
from megatron_completedp.errors import CheckpointError
from megatron_completedp.mcore.checkpoint import shared_problem
from megatron_completedp.mcore.checkpoint_info import CONFIG_FILE, find_checkpoint, read_table
from megatron_completedp.mcore.engine import Engine
from megatron_completedp.mcore.weights import load_model_weights


def load_initial_weights(engine: Engine, path: Path) -> None:
    """Put the weights of a checkpoint into `engine`, masters too. All ranks call it.

    `path` is the checkpoint, or a run folder, whose newest one is meant. Raises CheckpointError
    when it is not whole, and when the run would not compute what these weights were trained for:
    another shape, other multipliers in the forward pass.
    """
    path = _shared_checkpoint(path)
    problem = shared_problem(path)
    if problem is not None:
        raise CheckpointError(f"training.start_from is {path}, which is not whole: {problem}")
    _check_shape(engine.config.model, path)
    _check_multipliers(engine, path)
    load_model_weights(engine.chunks, path)
    engine.optimizer.reload_model_params()


def _shared_checkpoint(path: Path) -> Path:
    """What rank 0 finds at `path`: where a run still saves, ranks might find different ones."""
    found: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            found[0] = find_checkpoint(path)
        except CheckpointError as error:
            found[1] = str(error)
    dist.broadcast_object_list(found, src=0)
    checkpoint, problem = found
    if checkpoint is None:
        raise CheckpointError(f"training.start_from: {problem}")
    return Path(checkpoint)


def _check_shape(shape: ModelShape, path: Path) -> None:
    saved = build(ModelShape, read_yaml(path / CONFIG_FILE)["model"])
    # Longer or shorter sequences are the run's own choice.
    saved = replace(saved, seq_length=shape.seq_length, num_query_groups=saved.kv_heads)
    wanted = replace(shape, num_query_groups=shape.kv_heads)
    differing = [
        f"{name} is {value} there, {getattr(wanted, name)} here"
        for name, value in asdict(saved).items()
        if value != getattr(wanted, name)
    ]
    if differing:
        raise CheckpointError(
            f"training.start_from is {path}, the weights of another model: {'; '.join(differing)}. "
            f"Take the model section of its {CONFIG_FILE}."
        )


def _check_multipliers(engine: Engine, path: Path) -> None:
    table = read_table(path)
    saved = (table["residual"], table["logit_multiplier"])
    resolved = engine.resolved
    wanted = ([asdict(entry) for entry in resolved.residual], resolved.logit_multiplier)
    if saved != wanted:
        raise CheckpointError(
            f"training.start_from is {path}, trained with other residual or logit multipliers than "
            "this run's, so that the same weights would be another model. A model from Hugging "
            "Face has them all at 1: a run whose base is its own shape has, too."
        )
