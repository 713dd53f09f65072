"""One engine, a few steps: the root mean square of everything in it, as flat records.

All figures are of the whole model: they do not depend on how ranks share the work.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from megatron_completedp.check.tokens import Batches
from megatron_completedp.config.parallel import ParallelConfig
from megatron_completedp.config.run import RunConfig
from megatron_completedp.core.hyperparams import Resolved
from megatron_completedp.core.resolve import resolve
from megatron_completedp.core.roles import Module
from megatron_completedp.core.schedule import Schedule
from megatron_completedp.core.tables import Table
from megatron_completedp.errors import ConfigError
from megatron_completedp.mcore.engine import Engine
from megatron_completedp.mcore.observe import (
    Observation,
    Observer,
    Place,
    empty_step,
    gradients,
    root_mean_squares,
    weights,
)
from megatron_completedp.mcore.parallel import (
    ParallelState,
    destroy_parallel,
    initialize_parallel,
)
from megatron_completedp.mcore.platform import Platform, detect_platform

Quantity = Literal["activation", "change", "contribution", "gradient", "update", "decay", "memory"]


@dataclass(frozen=True)
class Record:
    """One root mean square over a whole tensor of the whole model."""

    quantity: Quantity
    """activation; its change since step 0; the contribution of the module's own weight to it (see
    `mcore.observe`); a weight's gradient, or update per unit of learning rate; its decay over a run
    and the memory of its moments (see `probe_optimizer`)."""
    name: str
    """A module or another place of `mcore.observe`."""
    layer: int | None
    step: int
    """Finished steps; a gradient or update is of the step that comes next."""
    rms: float


@dataclass(frozen=True)
class Processes:
    """Where engines are built, one after another."""

    platform: Platform
    state: ParallelState


@contextmanager
def processes(config: RunConfig) -> Iterator[Processes]:
    """Megatron's groups for the layout of `config`."""
    platform = detect_platform(config.training.device)
    timeout_s = config.training.timeout_s
    state = initialize_parallel(platform, config.parallel, timeout_s=timeout_s, seed=config.seed)
    try:
        yield Processes(platform, state)
    finally:
        destroy_parallel(keep_process_group=True)


def observable(config: RunConfig) -> RunConfig:
    """`config` in a form in which every tensor can be read and no number depends on the step.

    fp32, no clipping, a constant schedule without warmup, plain data parallelism: gradients stay
    whole, and an update over the learning rate is Adam's direction and its decay.
    """
    layout = ParallelConfig(
        tensor_model_parallel_size=config.parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.parallel.pipeline_model_parallel_size,
    )
    return replace(
        config,
        parallel=layout,
        schedule=Schedule(kind="constant", warmup_fraction=0.0),
        training=replace(config.training, precision="fp32", clip_grad=0.0),
    )


def divided(config: RunConfig, where: Processes) -> RunConfig:
    """`config` in micro batches that its data-parallel ranks have equal numbers of.

    Raises ConfigError for a batch that they cannot share.
    """
    batch, ranks = config.training.global_batch_size, where.state.dp_size
    if batch % ranks:
        raise ConfigError(
            f"a batch of {batch} sequences cannot be shared by {ranks} data-parallel ranks; "
            "expected a multiple. Start fewer ranks, or choose other ratios or another base."
        )
    micro = math.gcd(batch // ranks, config.training.micro_batch_size)
    return replace(config, training=replace(config.training, micro_batch_size=micro))


def resolved_by(config: RunConfig, table: Table | None) -> Resolved:
    """The numbers of `config`, by `table` instead of the one its rules select where given."""
    return resolve(
        config.model,
        config.ratios,
        config.rules,
        config.hyperparams,
        config.multipliers,
        table=table,
    )


def probe(
    config: RunConfig,
    where: Processes,
    batches: Batches,
    *,
    steps: Sequence[int],
    table: Table | None = None,
) -> list[Record]:
    """Train an `observable` run to the last of `steps`, and measure at each of them.

    Activations are those of one held-out batch. Gradients and updates are missing at the last step,
    changes and contributions at step 0. Raises TrainingDiverged.
    """
    resolved = resolved_by(config, table)
    engine = Engine(config, resolved, where.platform)
    observer = Observer(engine)
    held_out = batches.held_out()
    start = observer.observe(held_out).activations
    records: list[Record] = []
    for step in range(max(steps) + 1):
        measured: dict[Quantity, Mapping[Place, Tensor]] = {}
        if step in steps:
            measured |= _forward(observer.observe(held_out), start, step)
        if step < max(steps):
            before = weights(engine)
            engine.train_step(batches.train(step, where.state.dp_rank, where.state.dp_size))
            if step in steps:
                measured["gradient"] = gradients(engine)
                measured["update"] = _updates(before, weights(engine), resolved)
        for quantity, tensors in measured.items():
            records += _records(quantity, tensors, step)
    return records


def probe_optimizer(
    config: RunConfig, where: Processes, batches: Batches, table: Table | None = None
) -> list[Record]:
    """What the live optimizer of an `observable` run does to weights without a gradient.

    decay: how much weight decay alone would shrink each weight over all steps of the run, relative
    to its RMS. memory: Adam's direction one averaging window of the base, 1 / (1 - beta1) steps,
    after the only gradient it has seen.
    """
    resolved = resolved_by(config, table)
    engine = Engine(config, resolved, where.platform)
    start = weights(engine)
    empty_step(engine)
    shrunk = {
        place: (start[place] - weight) * (config.steps / start[place].square().mean().sqrt())
        for place, weight in weights(engine).items()
    }
    engine.train_step(batches.train(0, where.state.dp_rank, where.state.dp_size))
    window = round(1 / (1 - config.hyperparams.beta1))
    for _ in range(window - 1):
        empty_step(engine)
    before = weights(engine)
    empty_step(engine)
    held = {
        place: direction + resolved.get(Module(place[0]), place[1]).weight_decay * before[place]
        for place, direction in _updates(before, weights(engine), resolved).items()
    }
    return _records("decay", shrunk, 0) + _records("memory", held, 0)


def _forward(
    seen: Observation, start: Mapping[Place, Tensor], step: int
) -> dict[Quantity, Mapping[Place, Tensor]]:
    found: dict[Quantity, Mapping[Place, Tensor]] = {"activation": seen.activations}
    if step > 0:
        change = {place: seen.activations[place] - start[place] for place in start}
        # The embedding's input never changes, so that all of its change is its own.
        own = {place: change[place] for place in change if place[0] == Module.EMBEDDING}
        found |= {"change": change, "contribution": own | seen.contributions}
    return found


def _updates(
    before: Mapping[Place, Tensor], after: Mapping[Place, Tensor], resolved: Resolved
) -> dict[Place, Tensor]:
    return {
        (name, layer): (after[name, layer] - weight) / resolved.get(Module(name), layer).lr
        for (name, layer), weight in before.items()
    }


def _records(quantity: Quantity, tensors: Mapping[Place, Tensor], step: int) -> list[Record]:
    return [
        Record(quantity, name, layer, step, rms)
        for (name, layer), rms in root_mean_squares(tensors).items()
    ]
