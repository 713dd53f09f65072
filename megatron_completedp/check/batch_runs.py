"""One small model trained at several batches: its loss over the tokens it has seen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist

from megatron_completedp.check.batch_curves import EVALUATIONS, Curves, is_whole
from megatron_completedp.check.probe import Processes, divided, observable, processes
from megatron_completedp.check.tokens import Batches, token_sequences
from megatron_completedp.config.load import identity
from megatron_completedp.config.run import RunConfig
from megatron_completedp.errors import TrainingDiverged
from megatron_completedp.mcore.engine import Batch, Engine
from megatron_completedp.plan.run_plan import Plan
from megatron_completedp.study.points import numbers_hash
from megatron_completedp.study.results import Results
from megatron_completedp.study.sizes import moved

#: Held-out sequences in one evaluation.
HELD_OUT = 64


@dataclass(frozen=True)
class _Point:
    """One run of the model."""

    ratio: float
    rule: bool
    """Whether its numbers follow the batch."""
    config: RunConfig
    """Its batch and how long it is trained; its numbers are the plan's."""
    plan: Plan

    @property
    def name(self) -> str:
        """Of its row. A row of other numbers, by another table or default, is another run's."""
        return f"{self.ratio:g}/{self.config.seed}/{numbers_hash(self.plan)}"


def loss_curves(
    base: RunConfig,
    out: Path,
    *,
    batches: Sequence[float],
    steps: int,
    seeds: Sequence[int],
) -> tuple[Curves, Curves]:
    """The losses with the batch rule, and with the base's hyperparameters at every batch.

    `batches` are ratios to the base's, 1 among them, each trained for the tokens of `steps` steps
    of the base. `base` may itself have a base: its numbers are those of its own batch and length,
    however few steps it is trained here. The second, a control whose gap is many times the scatter,
    has the first of `seeds` alone. Rows are kept in `out`/results.jsonl. Raises ConfigError, before
    anything is trained, for batches that are not whole and for negative seeds.
    """
    base = observable(base)
    curves: dict[bool, dict[float, list[list[float]]]] = {True: {}, False: {}}
    with processes(base) as where:
        points = list(_points(base, where, batches, steps, seeds))
        results, known = _open(base, steps, out)
        for point in points:
            if point.name not in known:
                losses = known[point.name] = _train(point, where, out)
                if results is not None:
                    row = {"point": point.name, "losses": losses, "diverged": not is_whole(losses)}
                    results.append(row)
            curves[point.rule].setdefault(point.ratio, []).append(known[point.name])
    return curves[True], {1.0: curves[True][1][:1], **curves[False]}


def _points(
    base: RunConfig,
    where: Processes,
    batches: Sequence[float],
    steps: int,
    seeds: Sequence[int],
) -> Iterator[_Point]:
    """Every run of the check. Raises ConfigError for one that cannot be trained."""
    # Every evaluation takes the same sequences, so that micro batches must divide them.
    micro = math.gcd(base.training.micro_batch_size, HELD_OUT)
    base = replace(base, training=replace(base.training, micro_batch_size=micro))
    tokens = steps * base.batch_tokens
    for ratio in batches:
        for seed in seeds:
            seeded = replace(base, seed=seed)
            config = moved(seeded, "batch", ratio)
            training = replace(config.training, train_tokens=tokens)
            short = divided(replace(config, training=training), where)
            # At the base's batch the rule changes nothing.
            control = ratio != 1 and seed == seeds[0]
            for rule in (True, False) if control else (True,):
                # Resolved at the length of the run itself, which its ratios are of.
                yield _Point(ratio, rule, short, Plan.of(config if rule else seeded))


def _train(point: _Point, where: Processes, out: Path) -> list[float]:
    """Losses before the first step and after each tenth of the run, until it diverges."""
    config = point.config
    samples = config.steps * config.training.global_batch_size
    sequences = token_sequences(config, samples, out / "cache")
    batches = Batches(config, sequences)
    micro = config.training.micro_batch_size
    held_out = [batches.held_out(number) for number in range(HELD_OUT // micro)]
    engine = Engine(config, point.plan.resolved, where.platform)
    losses: list[float] = []
    try:
        for step in range(config.steps):
            if step * EVALUATIONS // config.steps >= len(losses):
                losses.append(_evaluate(engine, held_out))
            engine.train_step(batches.train(step, where.state.dp_rank, where.state.dp_size))
        losses.append(_evaluate(engine, held_out))
    except TrainingDiverged:
        pass  # a result: the evaluations that are missing say so
    return losses


def _evaluate(engine: Engine, held_out: Sequence[Batch]) -> float:
    loss = engine.evaluate(held_out)
    if not math.isfinite(loss):
        raise TrainingDiverged(f"the held-out loss is {loss}.", cause="validation")
    return loss


def _open(base: RunConfig, steps: int, out: Path) -> tuple[Results | None, dict[str, list[float]]]:
    """The results file, on rank 0, and what it holds, on every rank."""
    results, known = None, {}
    if dist.get_rank() == 0:
        meaning = {"steps": steps, "run": identity(base, "seed")}
        results = Results(out / "results.jsonl", meaning)
        known = {row["point"]: row["losses"] for row in results.rows()}
    shared = [known]
    dist.broadcast_object_list(shared)
    return results, shared[0]
