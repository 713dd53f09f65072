"""One small model trained at several batches: its loss over the tokens it has seen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Protocol

import torch.distributed as dist

from megatron_completedp.check.probe import Processes, divided, observable, processes
from megatron_completedp.check.tokens import Batches, token_sequences
from megatron_completedp.config.load import identity
from megatron_completedp.config.run import RunConfig
from megatron_completedp.errors import ConfigError
from megatron_completedp.mcore.engine import Batch, Engine
from megatron_completedp.plan.run_plan import Plan
from megatron_completedp.study.report import FigureSpec, Finding
from megatron_completedp.study.results import Results
from megatron_completedp.study.sizes import moved

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Evaluations in a run, evenly over its tokens.
EVALUATIONS = 10
#: Evaluations before this one are not compared.
FIRST_COMPARED = 3

#: Mean distance of a curve from the base's, in nats per token, from three tenths of the tokens
#: on. With the rule it is about 0.04, between two seeds 0.02, without the rule 0.2.
BAND = 0.08

#: Held-out sequences in one evaluation.
HELD_OUT = 64

#: Validation losses by batch ratio, one list per seed.
Curves = Mapping[float, Sequence[Sequence[float]]]


class CurveSettings(Protocol):
    """What `loss_curves` takes from the settings of the check."""

    @property
    def batches(self) -> tuple[float, ...]: ...
    @property
    def steps(self) -> int: ...
    @property
    def seeds(self) -> tuple[int, ...]: ...


def loss_curves(base: RunConfig, settings: CurveSettings, out: Path) -> tuple[Curves, Curves]:
    """The losses with the batch rule, and with the base's hyperparameters at every batch.

    The second, a control whose gap is many times the scatter, has the first seed alone.
    Rows are kept in `out`/results.jsonl. Raises ConfigError when the ratios do not include 1 or
    leave no whole batch.
    """
    if 1 not in settings.batches or len(settings.batches) < 2:
        raise ConfigError(
            f"batches is {settings.batches}; expected 1, the base's, and at least one other ratio."
        )
    training = replace(base.training, train_steps=settings.steps, train_tokens=None)
    base = observable(replace(base, training=training, base=None))
    curves: dict[bool, dict[float, list[list[float]]]] = {True: {}, False: {}}
    with processes(base) as where:
        results, known = _open(base, out)
        for ratio in settings.batches:
            for seed in settings.seeds:
                # At the base's batch the rule changes nothing.
                control = ratio != 1 and seed == settings.seeds[0]
                for rule in (True, False) if control else (True,):
                    name = f"{ratio:g}/{seed}/{rule}"
                    if name not in known:
                        known[name] = _train(_at(base, ratio, seed, rule), where, out)
                        if results is not None:
                            results.append({"point": name, "losses": known[name]})
                    curves[rule].setdefault(ratio, []).append(known[name])
    return curves[True], {1.0: curves[True][1][:1], **curves[False]}


def gap(curves: Curves, ratio: float) -> float:
    """Mean distance of a curve from the base's, nats per token, both averaged over seeds."""
    one, other = ([fmean(losses) for losses in zip(*curves[r], strict=True)] for r in (1, ratio))
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
        )
    yield Finding(
        what="model: the largest such distance with the batch rule left out (nats)",
        value=max(gap(without, ratio) for ratio in others),
        low=BAND,
        high=float("inf"),
        note="negative control: the band would see it",
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
                means = [fmean(losses) for losses in zip(*curves[ratio], strict=True)]
                tokens = [index / EVALUATIONS for index in range(len(means))]
                axes.plot(tokens[1:], means[1:], label=f"batch x {ratio:g}", color=color)
            axes.set_title(title)
            axes.set_xlabel("part of the tokens")
        panels[0].set_ylabel("validation loss (nats)")
        panels[1].legend()

    return FigureSpec(
        name="loss_over_tokens",
        caption="Validation loss over the tokens seen, at every batch; mean over seeds. Steps "
        "times the squared learning rate, the time of the equation, is in proportion to tokens. "
        "With the rule the curves come together; with the base's hyperparameters at every batch "
        "they do not.",
        draw=draw,
        size=(6.4, 3.6),
    )


def _at(base: RunConfig, ratio: float, seed: int, rule: bool) -> RunConfig:
    config = moved(replace(base, seed=seed), "batch", ratio)
    # Without a base, every ratio is 1 and the hyperparameters are the base's.
    return config if rule else replace(config, base=None)


def _train(config: RunConfig, where: Processes, out: Path) -> list[float]:
    """Losses before the first step and after each tenth of the run."""
    config = divided(config, where)
    samples = config.steps * config.training.global_batch_size
    sequences = token_sequences(config, samples, out / "cache")
    batches = Batches(config, sequences)
    held_out = list(_held_out(config, batches))
    engine = Engine(config, Plan.of(config).resolved, where.platform)
    losses: list[float] = []
    for step in range(config.steps):
        if step * EVALUATIONS // config.steps >= len(losses):
            losses.append(engine.evaluate(held_out))
        engine.train_step(batches.train(step, where.state.dp_rank, where.state.dp_size))
    return [*losses, engine.evaluate(held_out)]


def _held_out(config: RunConfig, batches: Batches) -> Iterator[Batch]:
    """The same sequences in micro batches of any size."""
    for number in range(HELD_OUT // config.training.micro_batch_size):
        yield batches.held_out(number)


def _open(base: RunConfig, out: Path) -> tuple[Results | None, dict[str, list[float]]]:
    """The results file, on rank 0, and what it holds, on every rank."""
    results, known = None, {}
    if dist.get_rank() == 0:
        results = Results(out / "results.jsonl", {"run": identity(base, "seed")})
        known = {row["point"]: row["losses"] for row in results.rows()}
    shared = [known]
    dist.broadcast_object_list(shared)
    return results, shared[0]
