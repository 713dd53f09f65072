"""Short training runs of the real engine, one process or several, and the same run in plain torch.

The run is a transferred one (base at half the width, depth, batch and a third of the tokens) with
other multipliers for every module and every layer, so that no two tensors share a learning rate,
decay, eps or betas, and no two branches a residual multiplier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_completedp.config.parallel import ParallelConfig
from megatron_completedp.config.run import RunConfig
from megatron_completedp.config.sections import TrainingConfig
from megatron_completedp.core.hyperparams import BaseHyperparams, Resolved
from megatron_completedp.core.multipliers import DepthProfiles, ModuleMultipliers, Multipliers
from megatron_completedp.core.ratios import Scale
from megatron_completedp.core.roles import GAIN_ROLES, MODULE_ROLES, Module
from megatron_completedp.core.schedule import Schedule
from megatron_completedp.core.shape import ModelShape
from megatron_completedp.core.tables import Rules
from megatron_completedp.mcore.checkpoint import Saver, load_checkpoint
from megatron_completedp.mcore.engine import Batch, Engine
from megatron_completedp.mcore.parallel import destroy_parallel, initialize_parallel
from megatron_completedp.mcore.platform import CpuPlatform
from megatron_completedp.optim.backend import StepInputs
from megatron_completedp.optim.reference import reference_adamw
from megatron_completedp.optim.segments import AdamWValues
from megatron_completedp.plan.run_plan import Plan
from megatron_completedp.train.loader import Share
from tests.mcore.common import tiny_shape
from tests.oracle import PlainGPT

STEPS = 8


@dataclass(frozen=True)
class Trace:
    """What a run reported, step by step, and its evaluation at the end."""

    losses: list[float]
    grad_norms: list[float]
    evaluation: float


def run_config(parallel: ParallelConfig | None = None, **changes: Any) -> RunConfig:
    """Eight steps of eight sequences in micro batches of two: more of them than pipeline stages."""
    model = tiny_shape(**changes.pop("model", {}))
    training = {"precision": "fp32", "clip_grad": 0.3, "z_loss": 1e-3}
    training |= changes.pop("training", {})
    config = RunConfig(
        run_dir="unused",
        rules=Rules(depth_alpha=0.75),
        base=Scale(
            hidden_size=model.hidden_size // 2,
            ffn_hidden_size=model.ffn_hidden_size // 2,
            num_attention_heads=model.num_attention_heads // 2,
            head_dim=model.head_dim,
            num_layers=model.num_layers // 2,
            batch_tokens=4 * model.seq_length,
            train_tokens=STEPS * 8 * model.seq_length // 3,
        ),
        hyperparams=BaseHyperparams(
            lr=4e-3,
            weight_decay=0.2,
            gain_weight_decay=0.05,
            eps=1e-6,
            embedding_init_std=0.5,
            hidden_init_std=0.1,
            unembedding_init_std=0.1,
        ),
        multipliers=distinct_multipliers(model),
        model=model,
        schedule=Schedule(kind="cosine", warmup_fraction=0.25),
        parallel=parallel or ParallelConfig(),
        training=TrainingConfig(
            global_batch_size=8, micro_batch_size=2, train_steps=STEPS, device="cpu", **training
        ),
    )
    return replace(config, **changes)


def distinct_multipliers(model: ModelShape) -> Multipliers:
    """Type factors and depth profiles between 0.5 and 2, none of them twice."""

    def spread(count: int, shift: int) -> list[float]:
        # Powers of 2 with exponents in [-1, 1], permuted so that fields do not move together.
        return [
            2 ** (2 * ((place * 5 + shift) % count + 0.5) / count - 1) for place in range(count)
        ]

    modules = list(Module)
    by_field = {
        item.name: spread(len(modules), shift)
        for shift, item in enumerate(fields(ModuleMultipliers), start=1)
    }
    return Multipliers(
        types={
            module: ModuleMultipliers(
                **{
                    name: column[i]
                    for name, column in by_field.items()
                    if name != "init_std_mult" or MODULE_ROLES[module] not in GAIN_ROLES
                }
            )
            for i, module in enumerate(modules)
            if module in model.modules
        },
        depth=DepthProfiles(
            **{
                item.name: tuple(spread(model.num_layers // 2, shift))
                for shift, item in enumerate(fields(DepthProfiles))
            }
        ),
        attention_residual_mult=0.8,
        mlp_residual_mult=1.3,
    )


def sample(config: RunConfig, index: int) -> Tensor:
    """Sequence number `index`, seq_length + 1 ids: a walk with small steps, easy to learn."""
    generator = torch.Generator().manual_seed(index)
    steps = torch.randint(1, 6, (config.model.seq_length + 1,), generator=generator)
    return (steps.cumsum(0) * 7) % config.model.vocab_size


def batches(config: RunConfig, step: int, *, dp_rank: int = 0, dp_size: int = 1) -> list[Batch]:
    """One rank's micro batches of `step`."""
    share = Share(
        global_batch_size=config.training.global_batch_size,
        micro_batch_size=config.training.micro_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
    )
    return [
        {"tokens": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}
        for ids in (
            torch.stack([sample(config, index) for index in indices])
            for indices in share.indices(step)
        )
    ]


def run_engine(
    config: RunConfig,
    *,
    save_to: Path | None = None,
    resume_from: Path | None = None,
    stop_at: int = STEPS,
    inspect: Callable[[Engine], Any] | None = None,
) -> tuple[Trace, Any]:
    """Train `config` in this process's layout from step 0, or from a checkpoint, to `stop_at`.

    Returns the trace and what `inspect` made of the engine at the end.
    """
    platform = CpuPlatform()
    # The tests of one process share a layout that is set up once; several processes set up theirs.
    ours = not parallel_state.model_parallel_is_initialized()
    if ours:
        initialize_parallel(platform, config.parallel, timeout_s=120, seed=config.seed)
    try:
        engine = Engine(config, Plan.of(config).resolved, platform)
        if resume_from is not None:
            load_checkpoint(engine, resume_from)
        ranks = {
            "dp_rank": parallel_state.get_data_parallel_rank(),
            "dp_size": parallel_state.get_data_parallel_world_size(),
        }
        losses, grad_norms = [], []
        while engine.step < stop_at:
            result = engine.train_step(batches(config, engine.step, **ranks))
            losses.append(result.loss)
            grad_norms.append(result.grad_norm)
        trace = Trace(losses, grad_norms, engine.evaluate(batches(config, 1000, **ranks)))
        if save_to is not None:
            Saver(engine, save_to, config.checkpoint, config_hash="test").save()
        return trace, inspect(engine) if inspect else None
    finally:
        if ours:
            destroy_parallel(keep_process_group=True)


def run_oracle(config: RunConfig, weights: dict[str, Tensor]) -> Trace:
    """The same run on PlainGPT and the reference AdamW, from the engine's initial `weights`."""
    resolved = Plan.of(config).resolved
    model = PlainGPT(
        config.model,
        resolved.residual,
        z_loss=config.training.z_loss,
        logit_multiplier=resolved.logit_multiplier,
    )
    model.load_from_megatron(weights)
    ranges = list(oracle_ranges(model, resolved))
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p, _, _ in ranges]
    losses, grad_norms = [], []
    for step in range(config.steps):
        model.zero_grad()
        micro_batches = batches(config, step)
        reported = 0.0
        for batch in micro_batches:
            loss, cross_entropy = model(batch["tokens"], batch["labels"])
            (loss / len(micro_batches)).backward()
            reported += cross_entropy.item() / len(micro_batches)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.training.clip_grad)
        inputs = StepInputs(
            step=step + 1, lr_fraction=config.schedule.at(step, config.steps), grad_scale=1.0
        )
        for (parameter, rows, values), (first, second) in zip(ranges, moments, strict=True):
            reference_adamw(
                parameter[rows], parameter.grad[rows], first[rows], second[rows], values, inputs
            )
        losses.append(reported)
        grad_norms.append(norm.item())
    with torch.no_grad():
        held_out = [model(b["tokens"], b["labels"])[1].item() for b in batches(config, 1000)]
    return Trace(losses, grad_norms, sum(held_out) / len(held_out))


def oracle_ranges(
    model: PlainGPT, resolved: Resolved
) -> Iterator[tuple[Tensor, slice, AdamWValues]]:
    """(parameter, rows, values) for every module of the plain model, fused ones told apart."""
    for name, parameter in model.named_parameters():
        *path, tail, _ = name.split(".")
        layer, start = int(path[1]) if path else None, 0
        if tail == "qkv":  # all q rows, then all k, then all v
            modules = [Module.Q, Module.K, Module.V]
        elif tail == "gate_up":
            modules = [Module.GATE, Module.UP] if model.shape.gated else [Module.UP]
        else:
            modules = [Module(tail)]
        for module in modules:
            hp = resolved.get(module, layer)
            rows = parameter.shape[0]
            if len(modules) > 1:
                rows = model.shape.module_parameters(module) // model.shape.hidden_size
            values = AdamWValues(
                lr=hp.lr,
                weight_decay=hp.weight_decay,
                eps=hp.eps,
                beta1=hp.beta1,
                beta2=hp.beta2,
            )
            yield parameter, slice(start, start + rows), values
            start += rows
        assert start == parameter.shape[0], name


def largest_difference(one: Trace, other: Trace) -> dict[str, float]:
    """Largest relative difference over the steps, by reported quantity."""
    assert len(one.losses) == len(other.losses)

    def worst(a: list[float], b: list[float]) -> float:
        return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))

    return {
        "loss": worst(one.losses, other.losses),
        "grad_norm": worst(one.grad_norms, other.grad_norms),
        "evaluation": worst([one.evaluation], [other.evaluation]),
    }
