"""The sde check's model: what it trains, with which numbers, and what becomes of what diverges."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from megatron_completedp.check import batch_runs
from megatron_completedp.check.batch_curves import (
    BAND,
    EVALUATIONS,
    Curves,
    compare,
    curve_figure,
    gap,
)
from megatron_completedp.check.batch_runs import HELD_OUT, loss_curves
from megatron_completedp.check.mutation import Cell, mutated
from megatron_completedp.check.sizes import small_base
from megatron_completedp.config.parallel import ParallelConfig
from megatron_completedp.config.run import RunConfig
from megatron_completedp.core.hyperparams import Resolved
from megatron_completedp.core.ratios import Ratios
from megatron_completedp.core.roles import Module
from megatron_completedp.core.tables import Rules, build_table
from megatron_completedp.errors import ConfigError
from megatron_completedp.mcore.parallel import destroy_parallel, initialize_parallel
from megatron_completedp.mcore.platform import Platform
from megatron_completedp.plan import run_plan
from megatron_completedp.plan.run_plan import Plan
from megatron_completedp.study.plot import render
from megatron_completedp.study.sizes import moved

#: Losses of a run to its end, and of one that diverged in the third tenth of its tokens.
WHOLE = [5.0 - 0.1 * index for index in range(EVALUATIONS + 1)]
HIGHER = [loss + 2 * BAND for loss in WHOLE]
BROKEN = WHOLE[:3]


@pytest.fixture(scope="module", autouse=True)
def own_groups(platform: Platform) -> Iterator[None]:
    """A check sets up Megatron's groups itself, as the command does."""
    destroy_parallel(keep_process_group=True)
    yield
    initialize_parallel(platform, ParallelConfig(), timeout_s=60, seed=1234)


class Recorder:
    """Stands for the engine: notes what each run was given, and trains nothing.

    A sequence is its own number, over and over.
    """

    made: list[Recorder]

    def __init__(self, config: RunConfig, resolved: Resolved, platform: Platform) -> None:
        self.config = config
        self.resolved = resolved
        self.steps = 0
        self.held_out: list[int] = []
        self.made.append(self)

    def train_step(self, batches: Sequence[dict[str, Any]]) -> None:
        numbers = [number for batch in batches for number in batch["tokens"][:, 0].tolist()]
        assert len(set(numbers)) == self.config.training.global_batch_size
        assert not set(numbers) & set(self.held_out)
        self.steps += 1

    def evaluate(self, batches: Sequence[dict[str, Any]]) -> float:
        self.held_out = [number for batch in batches for number in batch["tokens"][:, 0].tolist()]
        return 1.0


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """The runs that were trained, in order."""
    monkeypatch.setattr(Recorder, "made", [], raising=False)
    monkeypatch.setattr(batch_runs, "Engine", Recorder)
    monkeypatch.setattr(
        batch_runs, "token_sequences", lambda *_: lambda number: torch.full((33,), number)
    )
    return Recorder.made


def sized(batch: int, micro: int) -> RunConfig:
    """The built-in base in batches of `batch` sequences."""
    base = small_base()
    training = replace(base.training, global_batch_size=batch, micro_batch_size=micro)
    return replace(base, training=training)


def trained(base: RunConfig, out: Path, **changes: Any) -> tuple[Curves, Curves]:
    """The curves of the cheapest settings that `SdeSettings` allows, but for `changes`."""
    values: dict[str, Any] = {"batches": (1.0, 2.0), "steps": 20, "seeds": (0,)}
    return loss_curves(base, out, **{**values, **changes})


def rows(out: Path) -> list[dict[str, Any]]:
    lines = (out / "results.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batches": (1.0, 0.3)}, "turns global_batch_size = 8 into 2.4"),
        ({"seeds": (0, -1)}, "seed is -1"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is(
    engines: list[Recorder], tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        trained(small_base(), tmp_path, **changes)
    assert engines == []
    assert list(tmp_path.iterdir()) == []


def test_every_run_has_every_evaluation_at_the_fewest_steps(
    engines: list[Recorder], tmp_path: Path
) -> None:
    with_rule, without = trained(small_base(), tmp_path, batches=(0.5, 1, 2))
    runs = [run for curves in (with_rule, without) for seeds in curves.values() for run in seeds]
    assert {len(run) for run in runs} == {EVALUATIONS + 1}
    assert [engine.steps for engine in engines] == [40, 40, 20, 10, 10]


@pytest.mark.parametrize("micro", [3, 48, 96, 128])
def test_every_batch_is_evaluated_on_the_same_sequences_whatever_the_micro_batch(
    engines: list[Recorder], tmp_path: Path, micro: int
) -> None:
    trained(sized(micro, micro), tmp_path)
    assert all(engine.held_out == list(range(HELD_OUT)) for engine in engines)
    assert all(engine.config.training.micro_batch_size <= micro for engine in engines)


def test_a_run_with_a_base_keeps_its_ratios_and_moves_its_batch_alone(
    engines: list[Recorder], tmp_path: Path
) -> None:
    """Its raw learning rate is that of another size: trained here, it would tell nothing."""
    proxy = small_base()
    target = moved(moved(moved(proxy, "width", 2), "depth", 2), "duration", 4)
    trained(target, tmp_path, batches=(1, 4), steps=40)
    own, at_batch_4, control = engines
    assert own.resolved.ratios == Ratios(m_N=2, m_L=2, m_D=4)
    assert at_batch_4.resolved.ratios == Ratios(m_N=2, m_L=2, m_B=4, m_D=4)
    assert own.resolved == control.resolved == Plan.of(target).resolved
    # lr of a hidden weight: 1/m_N, and m_S^-1/2 = (m_B / m_D)^1/2.
    lr = proxy.hyperparams.lr
    assert own.resolved.get(Module.Q, 0).lr == pytest.approx(lr / 2 / 2)
    assert at_batch_4.resolved.get(Module.Q, 0).lr == pytest.approx(lr / 2)
    # However long the run is, the check trains for its own steps.
    assert [engine.steps for engine in engines] == [40, 10, 10]


def test_rows_of_another_table_are_trained_again(
    engines: list[Recorder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = small_base()
    trained(base, tmp_path)
    assert len(engines) == 3
    trained(base, tmp_path)
    assert len(engines) == 3, "what was trained is kept"
    table = mutated(build_table(Rules()), Cell("hidden_weight", "lr", "m_B"), Fraction(1, 2))
    monkeypatch.setattr(run_plan, "resolve", partial(run_plan.resolve, table=table))
    trained(base, tmp_path)
    assert len(engines) == 4, "the numbers of the base, and of the control, are what they were"
    assert engines[-1].resolved.get(Module.Q, 0).lr == pytest.approx(2 * base.hyperparams.lr)
    assert len(rows(tmp_path)) == 4


def test_without_a_batch_rule_the_control_is_the_same_run(
    engines: list[Recorder], tmp_path: Path
) -> None:
    sp = replace(small_base(), rules=Rules(parametrization="sp"))
    with_rule, without = trained(sp, tmp_path)
    assert with_rule == without
    assert len(engines) == 2


def test_runs_that_diverge_are_rows_and_the_check_reports_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real engine, micro batches larger than the held-out set, and a restart."""
    base = sized(96, 96)
    wild = replace(base, hyperparams=replace(base.hyperparams, lr=1e30))
    curves = trained(wild, tmp_path)
    assert [row["diverged"] for row in rows(tmp_path)] == [True, True, True]
    assert all(1 <= len(row["losses"]) <= EVALUATIONS for row in rows(tmp_path))
    findings = list(compare(*curves))
    assert not any(finding.passed for finding in findings)
    assert "1 of 1 runs at batch x 1 diverged" in findings[0].note
    monkeypatch.delattr(batch_runs, "Engine")
    assert trained(wild, tmp_path) == curves


def test_a_control_that_diverges_differs() -> None:
    findings = list(compare({1.0: [WHOLE], 2.0: [WHOLE]}, {1.0: [WHOLE], 2.0: [BROKEN]}))
    assert [finding.passed for finding in findings] == [True, True]
    assert findings[1].value == math.inf
    assert "1 of 1 runs at batch x 2 diverged" in findings[1].note


def test_a_run_with_the_rule_that_diverges_fails_and_is_named() -> None:
    with_rule: Curves = {1.0: [WHOLE, WHOLE], 2.0: [WHOLE, WHOLE], 4.0: [WHOLE, BROKEN]}
    without: Curves = {1.0: [WHOLE], 2.0: [HIGHER], 4.0: [HIGHER]}
    findings = list(compare(with_rule, without))
    assert [finding.passed for finding in findings] == [True, False, True]
    assert "batch x 4" in findings[1].what
    assert findings[1].note == "1 of 2 runs at batch x 4 diverged"


def test_a_base_that_diverges_leaves_nothing_to_compare() -> None:
    curves: Curves = {1.0: [BROKEN], 2.0: [HIGHER]}
    assert math.isnan(gap(curves, 2.0))
    assert not any(finding.passed for finding in compare(curves, curves))


def test_a_gap_is_of_the_means_over_seeds_from_three_tenths_on() -> None:
    late = [*(9.0,) * 3, *WHOLE[3:]]
    assert gap({1.0: [WHOLE, HIGHER], 2.0: [late, HIGHER]}, 2.0) == 0
    assert gap({1.0: [WHOLE], 2.0: [WHOLE, HIGHER]}, 2.0) == pytest.approx(BAND)


def test_the_figure_has_a_line_for_what_is_whole_and_a_cross_for_what_diverged() -> None:
    with_rule: Curves = {1.0: [WHOLE, WHOLE], 2.0: [WHOLE, BROKEN]}
    spec = curve_figure(with_rule, {1.0: [WHOLE], 2.0: [BROKEN]})
    figure = Figure(figsize=spec.size)
    spec.draw(figure)
    left, right = (
        {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
        for axes in figure.axes
    )
    assert list(left) == ["batch x 1", "batch x 2", "batch x 2, diverged"]
    assert [y for _, y in left["batch x 2"]] == WHOLE[1:], "the one that diverged is in no mean"
    assert list(right) == ["batch x 1", "batch x 2, diverged"]
    assert right["batch x 2, diverged"] == [[0.3, 0.98]]
    assert render(spec)["png"].startswith(b"\x89PNG")
