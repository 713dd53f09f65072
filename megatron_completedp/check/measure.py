"""Engines along an axis, each measured once, and the slopes of what was measured.

A series is one quantity of one module at one step. Its slope is that of log2 RMS, averaged over
seeds, against log2 of the size's ratio to the base.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch.distributed as dist

from megatron_completedp.check.probe import (
    Processes,
    Record,
    divided,
    observable,
    probe,
    probe_optimizer,
    processes,
)
from megatron_completedp.check.settings import check_values
from megatron_completedp.check.tokens import Batches, token_sequences
from megatron_completedp.config.load import identity
from megatron_completedp.config.run import RunConfig
from megatron_completedp.core.ratios import Ratios
from megatron_completedp.core.tables import Parametrization, Table
from megatron_completedp.data.manifest import text_hashes
from megatron_completedp.errors import ConfigError, TrainingDiverged
from megatron_completedp.plan.run_plan import Plan
from megatron_completedp.study.fit import slope
from megatron_completedp.study.points import numbers_hash
from megatron_completedp.study.results import Results
from megatron_completedp.study.sizes import Axis, moved

#: What names a row.
_LABELS = ("axis", "ratio", "alpha", "seed", "numbers")

#: Places whose input has passed through half a layer more than the layer's own input.
_SECOND_HALF = frozenset({"mlp_norm", "gate", "up", "down", "mlp_branch"})


class Key(NamedTuple):
    """What a series measures."""

    quantity: str
    name: str
    where: str
    """Empty outside the stack; along depth first, middle or last; else `layers`, their mean."""
    step: int


#: log2 RMS by series, of one engine. Empty for one that diverged.
Series = Mapping[Key, float]


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """Sizes of one axis, by their ratio to the base."""

    axis: Axis
    ratios: tuple[float, ...]
    seeds: tuple[int, ...]
    alpha: float = 1.0
    """Depth exponent of the rules, in place of the run's."""


@dataclass(frozen=True, kw_only=True)
class LadderSettings:
    """What a check of slopes measures; each check has it under its own name."""

    run: str | None = None
    """YAML of the run that is the base; none means a small built-in one on synthetic tokens."""
    parametrization: Parametrization | None = None
    """Rules to check in place of the run's."""
    widths: tuple[float, ...] = (1, 2, 4)
    """Ratios of the width to the base's."""
    depths: tuple[float, ...] = (1, 2, 4)
    """Ratios of the depth to the base's."""
    alphas: tuple[float, ...] = (1, 0.5)
    """Depth exponents that the ladder of depths is measured at; other ladders take the run's."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights and data, over which slopes are averaged."""

    def __post_init__(self) -> None:
        check_values("alphas", self.alphas, least=0)
        check_values("seeds", self.seeds, least=1, why="nothing would be measured")

    def ladders(self, base: RunConfig, *, batch_and_duration: bool) -> list[Ladder]:
        """Width, depth at each alpha and, if asked for, batch and duration with the first seed."""
        alpha = base.rules.depth_alpha
        found = [Ladder(axis="width", ratios=self.widths, seeds=self.seeds, alpha=alpha)]
        found += [
            Ladder(axis="depth", ratios=self.depths, seeds=self.seeds, alpha=each)
            for each in self.alphas
        ]
        if batch_and_duration:
            axes: tuple[Axis, ...] = ("batch", "duration")
            found += [
                Ladder(axis=axis, ratios=(1, 4), seeds=self.seeds[:1], alpha=alpha) for axis in axes
            ]
        return found


class Bench:
    """Measures the engines of one base, and keeps what it measured.

    A context manager: inside it, Megatron's groups are up, and all ranks make the same calls.
    """

    def __init__(
        self, base: RunConfig, out: Path | None, *, steps: Sequence[int], optimizer: bool = False
    ) -> None:
        """`steps` are those of `probe`; with `optimizer`, `probe_optimizer` is measured too.

        Rows are kept in `out`/results.jsonl where a folder is given, and not measured again.
        """
        self.base = observable(base)
        self.steps = tuple(steps)
        self._optimizer = optimizer
        self._out = out
        self._known: dict[str, Series] = {}
        self._stack = ExitStack()
        self._processes: Processes
        self._results: Results | None = None

    def __enter__(self) -> Bench:
        self._processes = self._stack.enter_context(processes(self.base))
        known: list[dict[str, Any]] = []
        if self._out is not None and dist.get_rank() == 0:
            meaning = {
                "steps": self.steps,
                "optimizer": self._optimizer,
                # A row names its seed and its alpha itself.
                "run": identity(self.base, "seed", "depth_alpha"),
                "held_out": divided(self.base, self._processes).training.micro_batch_size,
            }
            text = text_hashes(self.base.data.train)
            self._results = Results(self._out / "results.jsonl", meaning, text=text)
            known = self._results.rows()
        shared = [known]
        dist.broadcast_object_list(shared)  # every rank must skip the same engines
        self._known = {_point(row): _series(row) for row in shared[0]}
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def beside(self, base: RunConfig, *, steps: Sequence[int], optimizer: bool) -> Bench:
        """Another bench in the same processes, without a file; `base` has this one's layout."""
        other = Bench(base, None, steps=steps, optimizer=optimizer)
        other._processes = self._processes
        return other

    def series(
        self, ladder: Ladder, ratio: float, seed: int, *, table: Table | None = None
    ) -> Series:
        """Measure one engine; with a `table` of one's own the row is not kept.

        At the base shape every table says the same, so that the base is measured once.
        """
        rules = replace(self.base.rules, depth_alpha=ladder.alpha)
        config = moved(replace(self.base, rules=rules, seed=seed), ladder.axis, ratio)
        if ladder.axis == "depth" and config.model.num_layers % 2:
            raise ConfigError(
                f"depth x {ratio:g} has {config.model.num_layers} layers; expected an even number, "
                "so that networks can be compared in their middle. Choose other ratios."
            )
        at_base = config.ratios == Ratios()
        axis, alpha = ladder.axis, ladder.alpha
        if at_base:
            # The same engine on every axis; only along depth are its layers averaged otherwise.
            axis, alpha = ("depth" if axis == "depth" else "width"), 1.0
        labels: dict[str, Any] = {
            "axis": axis,
            # Flags and YAML give floats for what a default may have as an int.
            "ratio": float(ratio),
            "alpha": float(alpha),
            "seed": seed,
            # A row of other rules, or of another default, is no measurement of these.
            "numbers": numbers_hash(Plan.of(config)),
        }
        name, keep = _point(labels), table is None or at_base
        if keep and name in self._known:
            return self._known[name]
        # How batch and duration act on training is the sde check's; here, where they start from.
        steps = self.steps if at_base or ladder.axis in ("width", "depth") else (0,)
        found = self._measure(config, ladder.axis, steps, table)
        if keep:
            self._known[name] = found
            if self._results is not None:
                rows = {"/".join(map(str, key)): value for key, value in found.items()}
                self._results.append({**labels, "log2_rms": rows})
        return found

    def _measure(
        self, config: RunConfig, axis: Axis, steps: Sequence[int], table: Table | None
    ) -> Series:
        config = divided(config, self._processes)
        samples = (max(steps) + 1) * config.training.global_batch_size
        cache = (self._out or Path(config.run_dir)) / "cache"
        batches = Batches(config, token_sequences(config, samples, cache))
        try:
            records = probe(config, self._processes, batches, steps=steps, table=table)
            if self._optimizer:
                records += probe_optimizer(config, self._processes, batches, table)
        except TrainingDiverged:
            return {}
        return summarize(records, axis, config.model.num_layers)


def slopes(
    bench: Bench, ladder: Ladder, *, table: Table | None = None
) -> tuple[dict[Key, float], dict[Key, dict[float, float]]]:
    """The slope of every series along `ladder`, and the points: mean log2 RMS by ratio.

    A series that diverged anywhere has a slope of NaN; `diverged` says where. Raises ConfigError
    for a ladder of one size.
    """
    if len(set(ladder.ratios)) < 2:
        raise ConfigError(
            f"the {ladder.axis} ladder has the ratios {ladder.ratios}; expected two or more "
            "different ones, or there is no slope."
        )
    measured = {
        ratio: [bench.series(ladder, ratio, seed, table=table) for seed in ladder.seeds]
        for ratio in sorted(set(ladder.ratios))
    }
    keys = dict.fromkeys(key for seeds in measured.values() for one in seeds for key in one)
    points = {
        key: {
            ratio: fmean(one.get(key, math.nan) for one in seeds)
            for ratio, seeds in measured.items()
        }
        for key in keys
    }
    found = {
        key: slope([math.log2(ratio) for ratio in by_ratio], list(by_ratio.values())).value
        for key, by_ratio in points.items()
    }
    return found, points


def diverged(bench: Bench, ladder: Ladder) -> list[tuple[float, int]]:
    """(ratio, seed) of the engines of `ladder` that diverged."""
    return [
        (ratio, seed)
        for ratio in sorted(set(ladder.ratios))
        for seed in ladder.seeds
        if not bench.series(ladder, ratio, seed)
    ]


def summarize(records: Sequence[Record], axis: Axis, num_layers: int) -> Series:
    """One number per series: log2 of the mean RMS over the layers of each position."""
    values: dict[Key, list[float]] = {}
    for record in records:
        for position in _where(record, axis, num_layers):
            key = Key(record.quantity, record.name, position, record.step)
            values.setdefault(key, []).append(record.rms)
    # NaN, not -inf, where all is zero: there is nothing to fit, and a finding on it fails.
    return {
        key: math.log2(mean) if (mean := fmean(rms)) > 0 else math.nan
        for key, rms in values.items()
    }


def _where(record: Record, axis: Axis, num_layers: int) -> list[str]:
    """The positions whose mean `record` is part of.

    Along depth, networks are compared where their inputs have passed through the same part of all
    layers: at the first layer none, in the middle half, at the end all.
    """
    layer, half = record.layer, num_layers // 2
    if layer is None:
        return [""]
    if axis != "depth":
        return ["layers"]
    if record.name == "residual":  # the stream after a layer
        return ["middle"] * (layer == half - 1) + ["last"] * (layer == num_layers - 1)
    if record.name in _SECOND_HALF:
        # Their middle lies between two layers; changes grow in proportion to the position.
        return ["middle"] * (layer in (half - 1, half))
    return ["first"] * (layer == 0) + ["middle"] * (layer == half)


def _point(labels: Mapping[str, Any]) -> str:
    return "/".join(str(labels.get(name)) for name in _LABELS)


def _series(row: Mapping[str, Any]) -> Series:
    found = {}
    for text, value in row["log2_rms"].items():
        quantity, name, where, step = text.split("/")
        found[Key(quantity, name, where, int(step))] = value
    return found
