"""Follow the engine's optimizer with the reference AdamW on whole tensors, in any layout.

Two layouts' gradients differ in their rounding, which training amplifies from step to step; so what
the reference is given are the gradients of the run itself, as they are after every reduction. All
else it has from elsewhere: the initial weights from the model, their layout from PlainGPT, the
values from the resolved table, the schedule and the clipping from the configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_completedp.config.parallel import ParallelConfig
from megatron_completedp.config.run import RunConfig
from megatron_completedp.core.shape import ModelShape
from megatron_completedp.mcore.engine import Engine, StepResult
from megatron_completedp.mcore.optimizer import held_tensors, optimizer_parts
from megatron_completedp.optim.backend import StepInputs
from megatron_completedp.optim.per_module import PerModuleAdamW
from megatron_completedp.optim.reference import reference_adamw
from tests.dist.model_cases import unshard
from tests.mcore.engine_runs import batches, oracle_ranges, run_config, run_engine
from tests.oracle import PlainGPT, from_megatron

STEPS = 100

#: Whole tensors by PlainGPT's names.
Whole = dict[str, Tensor]


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of one TP rank's flattened tensor."""

    name: str
    tp_rank: int
    shape: torch.Size
    start: int
    stop: int
    elements: Tensor


class Reference:
    """Weights and moments of the plain model, in float32, one row range at a time."""

    def __init__(self, config: RunConfig, engine: Engine, weights: Whole) -> None:
        self.config = config
        model = PlainGPT(config.model, engine.resolved.residual).requires_grad_(False)
        model.load_state_dict(weights)
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        self.ranges = list(oracle_ranges(model, engine.resolved))
        self.moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in self.names}
        # The negative control: one range once more, with twice the eps, the value that shows least.
        parameter, rows, values = self.ranges[len(self.ranges) // 2]
        self.wrong = parameter[rows].clone()
        self.wrong_moments = torch.zeros_like(self.wrong), torch.zeros_like(self.wrong)
        self.wrong_place = parameter, rows, replace(values, eps=2 * values.eps)

    def step(self, grads: Whole, result: StepResult, number: int) -> None:
        """The update that the engine's step `number`, counted from 1, ought to have made."""
        clip = self.config.training.clip_grad
        inputs = StepInputs(
            step=number,
            lr_fraction=self.config.schedule.at(number - 1, self.config.steps),
            grad_scale=min(1.0, clip / (result.grad_norm + 1e-6)),
        )
        for parameter, rows, values in self.ranges:
            first, second = (moment[rows] for moment in self.moments[parameter])
            grad = grads[self.names[parameter]][rows]
            reference_adamw(parameter[rows], grad, first, second, values, inputs)
        parameter, rows, values = self.wrong_place
        grad = grads[self.names[parameter]][rows]
        reference_adamw(self.wrong, grad, *self.wrong_moments, values, inputs)

    def errors(self, weights: Whole, first: Whole, second: Whole) -> dict[str, float]:
        """The largest relative error of a row range's weights or moments, and the control's."""
        found = [
            relative(theirs[self.names[parameter]][rows], ours[rows])
            for parameter, rows, _ in self.ranges
            for theirs, ours in zip(
                (weights, first, second), (parameter, *self.moments[parameter]), strict=True
            )
        ]
        parameter, rows, _ = self.wrong_place
        control = relative(weights[self.names[parameter]][rows], self.wrong)
        return {"worst": max(found), "control": control}


def relative(theirs: Tensor, ours: Tensor) -> float:
    """The norm of the difference over the norm. In float64, where the norm itself is exact."""
    return ((theirs.double() - ours.double()).norm() / ours.double().norm()).item()


def follow(layout: dict[str, Any]) -> dict[str, float]:
    """Errors after 100 steps, on rank 0; see `Reference.errors`."""
    parallel = ParallelConfig(**layout)
    config = run_config(parallel)
    dp_size = dist.get_world_size() // parallel.model_parallel_size
    training = replace(
        config.training,
        train_steps=STEPS,
        micro_batch_size=config.training.global_batch_size // (2 * dp_size),
    )
    base = replace(config.base, train_tokens=STEPS * config.batch_tokens // 3)
    config = replace(config, base=base, training=training)
    return run_engine(config, stop_at=0, inspect=_follow)[1]


def _follow(engine: Engine) -> dict[str, float]:
    config = engine.config
    ranks = {
        "dp_rank": parallel_state.get_data_parallel_rank(),
        "dp_size": parallel_state.get_data_parallel_world_size(),
    }
    captured = [_model_pieces(engine)]
    _capture_gradients(engine, captured)
    results = [
        engine.train_step(batches(config, number, **ranks)) for number in range(config.steps)
    ]
    engine.evaluate(batches(config, 0, **ranks))  # gathers parameters where that is overlapped
    captured.append(_model_pieces(engine))
    for moment in ("exp_avg", "exp_avg_sq"):
        captured.append(
            _held_pieces(engine, lambda inner, held, key=moment: inner.state[held][key])
        )
    # All at once: a collective in every step would take longer than the steps.
    start, *rest = _gather(engine, captured)
    *grads, end, first, second = rest
    if dist.get_rank() > 0:
        return {}
    reference = Reference(config, engine, start)
    values = [values for _, _, values in reference.ranges]
    assert len(set(values)) == len(values), "every range has values of its own"
    for number, (of_step, result) in enumerate(zip(grads, results, strict=True), start=1):
        reference.step(of_step, result, number)
    assert all(relative(end[name], start[name]) > 0.01 for name in start), "every weight trains"
    return reference.errors(end, first, second)


def _capture_gradients(engine: Engine, captured: list[list[Piece]]) -> None:
    """Append the gradients of every step to `captured` just before they are used."""
    (part,) = optimizer_parts(engine.optimizer)
    step = part.optimizer.step

    def capture_and_step() -> None:
        captured.append(_held_pieces(engine, lambda _, held: held.grad))
        step()

    part.optimizer.step = capture_and_step


def _model_pieces(engine: Engine) -> list[Piece]:
    """The weights with which the model computes, whole on every data-parallel rank."""
    return [
        _piece(item.global_name, item.parameter, 0, item.parameter.numel(), item.parameter)
        for item in engine.parameters
    ]


def _held_pieces(engine: Engine, choose: Callable[[PerModuleAdamW, Tensor], Tensor]) -> list[Piece]:
    """What `choose` takes for each tensor of the inner optimizer."""
    names = {item.parameter: item.global_name for item in engine.parameters}
    return [
        _piece(names[model], model, start, stop, choose(part.optimizer, held))
        for part in optimizer_parts(engine.optimizer)
        for held, model, start, stop in held_tensors(part)
    ]


def _piece(name: str, model: Tensor, start: int, stop: int, elements: Tensor) -> Piece:
    rank = parallel_state.get_tensor_model_parallel_rank()
    return Piece(name, rank, model.shape, start, stop, elements.detach().flatten().clone())


def _gather(engine: Engine, sets: list[list[Piece]]) -> list[Whole]:
    """Each of `sets` as whole tensors from all ranks' pieces; on rank 0, empty on the others."""
    if dist.get_rank() > 0:
        dist.gather_object(sets)
        return [{} for _ in sets]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(sets, gathered)
    return [
        _assemble(chain(*of_ranks), engine.config.model) for of_ranks in zip(*gathered, strict=True)
    ]


def _assemble(pieces: Iterable[Piece], shape: ModelShape) -> Whole:
    parts: dict[str, dict[int, Tensor]] = {}
    for piece in pieces:
        of_name = parts.setdefault(piece.name, {})
        local = of_name.setdefault(piece.tp_rank, torch.full(piece.shape, torch.nan))
        place = local.view(-1)[piece.start : piece.stop]
        if place[:1].isnan().any():
            place.copy_(piece.elements)
        assert torch.equal(place, piece.elements), "data-parallel ranks must agree"
    whole = {
        name: unshard(name, [of_name[rank] for rank in sorted(of_name)], shape)
        for name, of_name in parts.items()
    }
    assert not any(tensor.isnan().any() for tensor in whole.values()), "an element is missing"
    return from_megatron(shape, whole)
