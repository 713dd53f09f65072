"""One small model trained at several batches: its loss over the tokens it has seen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Protocol

import torch.distributed as dist

from megatron_completedp.check.probe import Processes, divided, observable, processes
from megatron_completedp.check.tokens import Batches, token_sequences
from megatron_completedp.config.load import identity
from megatron_completedp.config.run import RunConfig
from megatron_completedp.errors import ConfigError, TrainingDiverged
from megatron_completedp.mcore.engine import Batch, Engine
from megatron_completedp.plan.run_plan import Plan
from megatron_completedp.study.points import numbers_hash
from megatron_completedp.study.report import FigureSpec, Finding
from megatron_completedp.study.results import Results
from megatron_completedp.study.sizes import moved

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Evaluations in a run, evenly over its tokens, after the one before its first step.
EVALUATIONS = 10
#: Evaluations before this one are not compared.
FIRST_COMPARED = 3

#: Mean distance of a curve from the base's, in nats per token, from three tenths of the tokens
#: on. With the rule it is about 0.04, between two seeds 0.02, without the rule 0.2.
BAND = 0.08

#: Held-out sequences in one evaluation.
HELD_OUT = 64

#: Validation losses by batch ratio, one list per seed; a run that diverged has too few of them.
Curves = Mapping[float, Sequence[Sequence[float]]]


class CurveSettings(Protocol):
    """What `loss_curves` takes from the settings of the check."""

    @property
    def batches(self) -> tuple[float, ...]: ...
    @property
    def steps(self) -> int: ...
    @property
    def seeds(self) -> tuple[int, ...]: ...


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


def loss_curves(base: RunConfig, settings: CurveSettings, out: Path) -> tuple[Curves, Curves]:
    """The losses with the batch rule, and with the base's hyperparameters at every batch.

    `base` may itself have a base: its numbers are those of its own batch and length, however few
    steps it is trained here. The second, a control whose gap is many times the scatter, has the
    first seed alone. Rows are kept in `out`/results.jsonl. Raises ConfigError, before anything is
    trained, for settings that give no curves to compare and for batches that are not whole.
    """
    _check(settings)
    base = observable(base)
    curves: dict[bool, dict[float, list[list[float]]]] = {True: {}, False: {}}
    with processes(base) as where:
        points = list(_points(base, settings, where))
        results, known = _open(base, settings.steps, out)
        for point in points:
            if point.name not in known:
                losses = known[point.name] = _train(point, where, out)
                if results is not None:
                    row = {"point": point.name, "losses": losses, "diverged": not _whole(losses)}
                    results.append(row)
            curves[point.rule].setdefault(point.ratio, []).append(known[point.name])
    return curves[True], {1.0: curves[True][1][:1], **curves[False]}


def gap(curves: Curves, ratio: float) -> float:
    """Mean distance of a curve from the base's, nats per token, both averaged over seeds.

    A run that diverged is never averaged: infinite with one at `ratio`, NaN with one at the base's.
    """
    if not all(map(_whole, curves[1])):
        return math.nan
    if not all(map(_whole, curves[ratio])):
        return math.inf
    one, other = (_mean(curves[r]) for r in (1, ratio))
    pairs = list(zip(one, other, strict=True))[FIRST_COMPARED:]
    return fmean(abs(a - b) for a, b in pairs)


def compare(with_rule: Curves, without: Curves) -> Iterator[Finding]:
    """The gap at every batch but the base's against the band, and the largest one without."""
    others = [ratio for ratio in with_rule if ratio != 1]
    for ratio in others:
        yield Finding(
            what=f"model: distance of the loss at batch x {ratio:g} from the base's (nats)",
            value=gap(with_rule, ratio),
            low=0,
            high=BAND,
            note=_diverged(with_rule, (1, ratio)),
        )
    diverged = _diverged(without, (1, *others))
    yield Finding(
        what="model: the largest such distance with the batch rule left out (nats)",
        value=max(gap(without, ratio) for ratio in others),
        low=BAND,
        high=float("inf"),
        note="negative control: the band would see a wrong rule; where this fails, no rule is "
        "wrong, but this run says nothing about it" + (diverged and f"; {diverged}"),
    )


def curve_figure(with_rule: Curves, without: Curves) -> FigureSpec:
    """Loss over tokens at every batch, with the rule and without."""

    def draw(figure: Figure) -> None:
        from megatron_completedp.study.plot import ladder_colors

        panels = figure.subplots(1, 2, sharey=True)
        for axes, curves, title in zip(
            panels, (with_rule, without), ("with the rule", "without"), strict=True
        ):
            ratios = sorted(curves)
            for ratio, color in zip(ratios, ladder_colors(len(ratios)), strict=True):
                _draw_runs(axes, curves[ratio], f"batch x {ratio:g}", color)
            axes.set_xlim(0, 1.02)
            axes.set_title(title)
            axes.set_xlabel("part of the tokens")
            axes.legend()
        panels[0].set_ylabel("validation loss (nats)")

    return FigureSpec(
        name="loss_over_tokens",
        caption="Validation loss over the tokens seen, at every batch; mean over seeds. Steps "
        "times the squared learning rate, the time of the equation, is in proportion to tokens. "
        "With the rule the curves come together; with the base's hyperparameters at every batch "
        "they do not. A cross at the top: a run diverged before it, and is in no mean.",
        draw=draw,
        size=(6.4, 3.6),
    )


def _draw_runs(
    axes: Axes, runs: Sequence[Sequence[float]], label: str, color: tuple[float, ...]
) -> None:
    """The mean of the runs that are whole, and a cross for each that is not."""
    whole, broken = list(filter(_whole, runs)), [run for run in runs if not _whole(run)]
    if whole:
        tokens = [index / EVALUATIONS for index in range(EVALUATIONS + 1)]
        axes.plot(tokens[1:], _mean(whole)[1:], label=label, color=color)
    if broken:
        # At the first evaluation that the run did not reach. There is no loss: the height is the
        # panel's own.
        missed = [len(run) / EVALUATIONS for run in broken]
        axes.plot(
            missed,
            [0.98] * len(missed),
            "x",
            color=color,
            label=f"{label}, diverged",
            transform=axes.get_xaxis_transform(),
        )


def _whole(losses: Sequence[float]) -> bool:
    """Whether the run reached its last evaluation."""
    return len(losses) > EVALUATIONS


def _mean(runs: Sequence[Sequence[float]]) -> list[float]:
    return [fmean(losses) for losses in zip(*runs, strict=True)]


def _diverged(curves: Curves, ratios: Sequence[float]) -> str:
    """Which runs at `ratios` diverged, in words; empty for none."""
    counts = {ratio: sum(not _whole(run) for run in curves[ratio]) for ratio in ratios}
    return ", ".join(
        f"{count} of {len(curves[ratio])} runs at batch x {ratio:g} diverged"
        for ratio, count in counts.items()
        if count
    )


def _check(settings: CurveSettings) -> None:
    """Raise ConfigError for settings that give no curves to compare."""
    if 1 not in settings.batches or len(set(settings.batches)) < 2:
        raise ConfigError(
            f"batches is {settings.batches}; expected 1, the base's, and at least one other ratio."
        )
    if not settings.seeds:
        raise ConfigError("seeds is empty; expected at least one, e.g. seeds: [0].")
    largest = max(settings.batches)
    if settings.steps < EVALUATIONS * largest:
        raise ConfigError(
            f"steps is {settings.steps}, which leaves {settings.steps / largest:g} at batch x "
            f"{largest:g}; expected {EVALUATIONS} or more there, one before each evaluation. Give "
            f"steps of at least {math.ceil(EVALUATIONS * largest)}, or smaller batches."
        )


def _points(base: RunConfig, settings: CurveSettings, where: Processes) -> Iterator[_Point]:
    """Every run of the check. Raises ConfigError for one that cannot be trained."""
    # Every evaluation takes the same sequences, so that micro batches must divide them.
    micro = math.gcd(base.training.micro_batch_size, HELD_OUT)
    base = replace(base, training=replace(base.training, micro_batch_size=micro))
    tokens = settings.steps * base.batch_tokens
    for ratio in settings.batches:
        for seed in settings.seeds:
            seeded = replace(base, seed=seed)
            config = moved(seeded, "batch", ratio)
            training = replace(config.training, train_tokens=tokens)
            short = divided(replace(config, training=training), where)
            # At the base's batch the rule changes nothing.
            control = ratio != 1 and seed == settings.seeds[0]
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
