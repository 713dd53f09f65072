"""What flows through a model, and the root mean squares of what its ranks share.

Names of places: the modules (for their outputs, their weights' gradients and updates), and
`attention` (core attention's output), `attention_branch` and `mlp_branch` (what a branch adds to
the residual stream, its multiplier included), `residual` (the stream after a layer) and `logits`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_completedp.core.roles import Module
from megatron_completedp.errors import ConfigError
from megatron_completedp.mcore.classify import ClassifiedParameter
from megatron_completedp.mcore.engine import Batch, Engine
from megatron_completedp.mcore.optimizer import apply_update, gradient_norm

#: (name, global layer); the layer is None outside the stack.
Place = tuple[str, int | None]
_Hook = Callable[[Any, Any, Any], None]


@dataclass(frozen=True)
class Observation:
    """One forward pass, as this rank saw it."""

    activations: dict[Place, Tensor] = field(default_factory=dict)
    """Outputs [sequence, batch, features]; where TP splits features, this rank's."""
    contributions: dict[Place, Tensor] = field(default_factory=dict)
    """By module: what the change of this weight alone adds to its output on its present input,
    (W - W at the start) x; for a gain (g - g at the start) x / rms(x)."""


class Observer:
    """Watches an engine's activations, and its weights' way from where they are now."""

    def __init__(self, engine: Engine) -> None:
        """Keep a copy of the weights.

        Raises ConfigError for sequence parallelism, which splits the inputs of the weights, and for
        layers whose norms are fused into the weight behind them.
        """
        if engine.config.parallel.sequence_parallel:
            raise ConfigError(
                "parallel.sequence_parallel is on, but activations are observed over whole "
                "sequences; turn it off."
            )
        self._engine = engine
        self._labels = {item.parameter: item for item in engine.parameters}
        self._start = {weight: weight.detach().clone() for weight in self._labels}

    def observe(self, batch: Batch) -> Observation:
        """The activations on one micro batch; give every data-parallel rank the same one."""
        seen = Observation()
        with self._hooks(seen):
            self._engine.evaluate([batch])
        return seen

    @contextmanager
    def _hooks(self, seen: Observation) -> Iterator[None]:
        hooks: list[tuple[Any, _Hook]] = []
        for chunk in self._engine.chunks:
            model = unwrap_model(chunk)
            if model.pre_process:
                hooks.append((model.embedding, _output("embedding", None, seen)))
            for layer in model.decoder.layers:
                hooks += self._layer_hooks(layer, seen)
            if model.post_process:
                final_norm = model.decoder.final_layernorm
                hooks.append((final_norm, self._norm("final_norm", None, seen)))
                hooks.append((model.output_layer, self._linear(None, seen)))
        handles = [module.register_forward_hook(hook) for module, hook in hooks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _layer_hooks(self, layer: Any, seen: Observation) -> list[tuple[Any, _Hook]]:
        index, attention = layer.layer_number - 1, layer.self_attention
        if not list(layer.input_layernorm.parameters()):
            raise ConfigError(
                "Transformer Engine's layers fuse each norm into the weight behind it, so its "
                "output cannot be observed; use an environment without Transformer Engine."
            )
        stream: dict[str, Tensor] = {}

        def keep(point: str) -> _Hook:
            def hook(module: Any, inputs: Any, output: Any) -> None:
                stream[point] = inputs[0].detach()

            return hook

        def branches(module: Any, inputs: Any, output: Any) -> None:
            end = _tensor(output)
            seen.activations["attention_branch", index] = stream["middle"] - stream["start"]
            seen.activations["mlp_branch", index] = end - stream["middle"]
            seen.activations["residual", index] = end

        return [
            (layer.input_layernorm, keep("start")),
            (layer.input_layernorm, self._norm("attention_norm", index, seen)),
            (attention.linear_qkv, self._linear(index, seen)),
            (attention.q_layernorm, self._norm("q_norm", index, seen)),
            (attention.k_layernorm, self._norm("k_norm", index, seen)),
            (attention.core_attention, _output("attention", index, seen)),
            (attention.linear_proj, self._linear(index, seen)),
            (layer.pre_mlp_layernorm, keep("middle")),
            (layer.pre_mlp_layernorm, self._norm("mlp_norm", index, seen)),
            (layer.mlp.linear_fc1, self._linear(index, seen)),
            (layer.mlp.linear_fc2, self._linear(index, seen)),
            (layer, branches),
        ]

    def _norm(self, name: str, layer: int | None, seen: Observation) -> _Hook:
        def hook(norm: Any, inputs: Any, output: Tensor) -> None:
            moved = norm.weight.detach() - self._start[norm.weight]
            unit = F.rms_norm(inputs[0].detach(), norm.normalized_shape, eps=norm.eps)
            seen.activations[name, layer] = output.detach()
            seen.contributions[name, layer] = unit * moved

        return hook

    def _linear(self, layer: int | None, seen: Observation) -> _Hook:
        def hook(linear: Any, inputs: Any, output: Any) -> None:
            if linear.weight is None:  # tied: the weight is the embedding's
                seen.activations["logits", layer] = _tensor(output)
                return
            label = self._labels[linear.weight]
            moved = linear.weight.detach() - self._start[linear.weight]
            own = F.linear(inputs[0].detach(), moved)
            if label.partition_dim == 1:  # every TP rank holds a part of each sum
                dist.all_reduce(own, group=parallel_state.get_tensor_model_parallel_group())
            for module, rows in _rows(label).items():
                name = "logits" if module is Module.UNEMBEDDING else module.value
                seen.activations[name, layer] = _tensor(output)[..., rows]
                seen.contributions[module.value, layer] = own[..., rows]

        return hook


def weights(engine: Engine) -> dict[Place, Tensor]:
    """A copy of this rank's weights by module, fused ones told apart."""
    return _by_module(engine, lambda weight: weight.detach().clone())


def gradients(engine: Engine) -> dict[Place, Tensor]:
    """A copy of the latest step's gradients by module: the mean loss's, before clipping.

    Only an engine without clipping and without a distributed optimizer keeps them whole.
    """
    return _by_module(engine, lambda weight: weight.main_grad.detach().clone())


def root_mean_squares(tensors: Mapping[Place, Tensor]) -> dict[Place, float]:
    """The RMS of each whole tensor of the model, on every rank, from the parts that ranks hold.

    The TP ranks of a stage hold equal shards or equal copies, so that the mean of their mean
    squares is that of the whole; pipeline stages hold different places.
    """
    found: dict[Place, float] = {}
    if tensors:
        squares = torch.stack([tensor.float().square().mean() for tensor in tensors.values()])
        dist.all_reduce(squares, group=parallel_state.get_tensor_model_parallel_group())
        size = parallel_state.get_tensor_model_parallel_world_size()
        roots = (math.sqrt(square / size) for square in squares.tolist())
        found = dict(zip(tensors, roots, strict=True))
    group = parallel_state.get_model_parallel_group()
    gathered: list[dict[Place, float]] = [{} for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(gathered, found, group=group)
    return {place: value for stage in gathered for place, value in stage.items()}


def _by_module(engine: Engine, read: Callable[[Any], Tensor]) -> dict[Place, Tensor]:
    return {
        (module.value, item.layer): read(item.parameter)[rows]
        for item in engine.parameters
        if not item.is_tied_copy
        for module, rows in _rows(item).items()
    }


def _rows(item: ClassifiedParameter) -> dict[Module, Tensor]:
    """The row numbers of each module in a local tensor."""
    rows: dict[Module, list[Tensor]] = {}
    for part in item.ranges:
        rows.setdefault(part.module, []).append(torch.arange(part.start, part.stop))
    return {module: torch.cat(parts) for module, parts in rows.items()}


def _output(name: str, layer: int | None, seen: Observation) -> _Hook:
    def hook(module: Any, inputs: Any, output: Any) -> None:
        seen.activations[name, layer] = _tensor(output)

    return hook


def _tensor(output: Any) -> Tensor:
    """The tensor in a Megatron module's output, which may come with a bias or a context."""
    return (output[0] if isinstance(output, tuple) else output).detach()


def empty_step(engine: Engine) -> None:
    """One optimizer step with gradients of zero: decay, and what the moments still hold."""
    for chunk in engine.chunks:
        chunk.zero_grad_buffer()
    engine.optimizer.zero_grad()
    apply_update(engine.optimizer, norm=gradient_norm(engine.optimizer), clip_grad=0.0)
