"""Drift, loss lost and the duration exponent, from rows whose optima are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from transfer_samples import base_run, ladder, parabola, rows_of

from megatron_completedp.check.calibrate import Exponent, fitted_exponent, write_exponent
from megatron_completedp.check.drift import LadderResult, analyse, excess
from megatron_completedp.check.ladder import Ladder
from megatron_completedp.check.transfer import _row, compare, judge
from megatron_completedp.check.transfer_figures import draw_sweeps
from megatron_completedp.config.load import load_config, to_yaml
from megatron_completedp.errors import CompletedPError
from megatron_completedp.study.fit import Interval
from megatron_completedp.study.tasks import Point


def result(study: Ladder, best: dict[int, float]) -> LadderResult:
    return analyse(study, "completedp", rows_of(study, parabola(best)))


def test_drift_of_known_optima() -> None:
    found = result(ladder(sizes=(32, 64, 128)), {32: 0.25, 64: 0.5, 128: -0.5})
    assert [item.drift for item in found.sizes] == pytest.approx([0, 0.25, -0.75])
    # Between the outermost, not from the reference: -0.5 to 0.5.
    assert found.span == pytest.approx(1.0)
    # All seeds are alike, so every resample is.
    assert found.span_interval.low == pytest.approx(1.0)


def test_loss_lost_is_the_parabola_at_the_reference_optimum() -> None:
    found = result(ladder(), {32: 0.0, 64: 0.5})
    # 0.1 nat per squared octave.
    assert [item.loss_lost for item in found.sizes] == pytest.approx([0, 0.025])


def test_loss_lost_far_from_the_optimum_is_read_from_the_sweep() -> None:
    found = result(ladder(log2_multiples=(-3, -2, -1, 0, 1)), {32: 0.0, 64: -2.0})
    assert found.sizes[1].transferred == pytest.approx(3.4)


def test_no_line_is_drawn_over_a_cliff() -> None:
    """The reference's best lies at 0.25, between 0 and a value 100 nats higher: 0 is nearer."""

    def losses(point: Point) -> float:
        size, x = point.labels["size"], point.labels["log2_multiple"]
        if size == 32:
            return 3.0 + 0.1 * (x - 0.25) ** 2
        return 103.0 if x > 0 else 3.0 + 0.1 * (x + 2) ** 2

    study = ladder(log2_multiples=(-3, -2, -1, 0, 1))
    found = analyse(study, "completedp", rows_of(study, losses)).sizes[1]
    assert found.best.x == pytest.approx(-2.0)
    assert found.transferred == pytest.approx(3.4)
    assert found.loss_lost == pytest.approx(0.4)


def test_loss_where_runs_diverge_is_infinite() -> None:
    def losses(point: Point) -> float:
        size, x = point.labels["size"], point.labels["log2_multiple"]
        return math.inf if size == 64 and x > -1 else 3.0 + 0.1 * (x + 2 * (size == 64)) ** 2

    study = ladder(log2_multiples=(-3, -2, -1, 0, 1))
    found = analyse(study, "completedp", rows_of(study, losses))
    assert math.isinf(found.sizes[1].transferred)


@pytest.mark.parametrize(("best", "passed"), [(0.45, True), (0.55, False), (-0.55, False)])
def test_the_verdict_holds_the_judged_parametrization_to_half_an_octave(
    best: float, passed: bool
) -> None:
    study = ladder()
    assert judge(study.settings, result(study, {32: 0.0, 64: best})).passed is passed


@pytest.mark.parametrize("best", [3.0, 50.0])
def test_a_comparison_never_fails(best: float) -> None:
    """Drifting, or not bracketed: sp is there to show it, and the verdict is about another."""
    study = ladder(max_added=2)
    judged = result(study, {32: 0.0, 64: 0.25})
    found = compare(study.settings, result(study, {32: 0.0, 64: best}), judged)
    assert found.passed
    assert found.value == pytest.approx(3.0 if best == 3 else 1)
    assert ("+2.75 [+2.75, +2.75] more than completedp" in found.note) is (best == 3)


def test_what_two_parametrizations_share_is_no_part_of_their_difference() -> None:
    """Seeds move every optimum at 64 by up to half an octave, alike in both."""
    shift = {1: 0.0, 2: 0.25, 3: 0.5}

    def losses(best: float) -> Callable[[Point], float]:
        def loss(point: Point) -> float:
            labels = point.labels
            at = (best + shift[labels["seed"]]) * (labels["size"] == 64)
            return 3.0 + 0.1 * (labels["log2_multiple"] - at) ** 2

        return loss

    study = ladder(seeds=(1, 2, 3), window=1.0)
    near, far = (
        analyse(study, "completedp", rows_of(study, losses(best))) for best in (0.25, 0.75)
    )
    assert far.span_interval.high - far.span_interval.low > 0.4
    value, interval = excess(far, near, window=1.0)
    assert value == pytest.approx(0.5)
    assert (interval.low, interval.high) == pytest.approx((0.5, 0.5))


def test_a_span_that_the_window_decides_says_so() -> None:
    """A curve steeper on the right than on the left: the wider the window, the lower the vertex."""

    def losses(point: Point) -> float:
        labels = point.labels
        x = labels["log2_multiple"]
        steep = 0.1 * max(x, 0) ** 3 if labels["size"] == 64 else 0
        return 3.0 + 0.04 * x * x + steep

    study = ladder(log2_multiples=(-2, -1, -0.5, 0, 0.5, 1, 2))
    found = analyse(study, "completedp", rows_of(study, losses))
    spans = list(found.span_by_window.items())
    assert [window for window, _ in spans] == [0.05, 0.1, 0.2]
    assert spans[1][1] == found.span
    assert spans[0][1] < spans[2][1]
    assert f"{spans[2][1]:.2f} at 0.2" in judge(study.settings, found).note


@pytest.mark.parametrize("best", [0.4, 0.6])
def test_an_interval_with_the_bound_in_it_is_said_either_way(best: float) -> None:
    study = ladder()
    near = result(study, {32: 0.0, 64: best})
    assert "more seeds" not in judge(study.settings, near).note
    wide = replace(near, span_interval=Interval(0.2, 0.7))
    finding = judge(study.settings, wide)
    assert finding.passed is (best < 0.5)
    assert "which holds the bound: more seeds would tell" in finding.note


def test_an_optimum_at_the_edge_fails_the_verdict() -> None:
    study = ladder(max_added=0)
    finding = judge(study.settings, result(study, {32: 0.0, 64: 2.4}))
    assert not finding.passed
    assert "not bracketed: size 64" in finding.note


@pytest.mark.parametrize("applied", [0.5, 0.25])
def test_the_exponent_is_found_whatever_part_is_applied(applied: float) -> None:
    """Optima of base * m_D^-0.4 under a rule that applies m_D^-q stand at log2 m_D * (q - 0.4)."""
    base = base_run(duration_exponent=applied)
    sizes = (12800, 25600, 51200)
    study = ladder(base, axis="duration", sizes=sizes)
    best = {size: math.log2(size / 12800) * (applied - 0.4) for size in sizes}
    found = fitted_exponent(study, result(study, best))
    assert found.value == pytest.approx(0.4)
    assert found.interval.low == pytest.approx(0.4)


def test_optima_that_are_on_no_line_leave_the_exponent_uncertain() -> None:
    """However well the seeds agree: they cannot know what two more durations would say."""
    sizes = (12800, 25600, 51200)
    study = ladder(axis="duration", sizes=sizes)
    found = fitted_exponent(study, result(study, {12800: 0.0, 25600: 0.5, 51200: 0.0}))
    assert found.interval.high - found.interval.low == pytest.approx(0, abs=1e-6)
    # A standard error of 0.5 / sqrt(3), by Student's t of one degree of freedom.
    reach = 12.706 * 0.5 / math.sqrt(3)
    low, high = found.line_interval.low, found.line_interval.high
    assert (high - low) / 2 == pytest.approx(reach, rel=0.01)
    assert (low + high) / 2 == pytest.approx(found.value)


def test_two_durations_are_always_on_a_line() -> None:
    study = ladder(axis="duration", sizes=(12800, 51200))
    assert math.isnan(
        fitted_exponent(study, result(study, {12800: 0, 51200: 0.5})).line_interval.low
    )


def test_sp_applies_no_exponent() -> None:
    sizes = (12800, 51200)
    study = ladder(axis="duration", sizes=sizes)
    rows = rows_of(study, parabola({12800: 0.0, 51200: -0.8}))
    assert fitted_exponent(study, analyse(study, "sp", rows)).value == pytest.approx(0.4)


@pytest.mark.parametrize("written", [True, False])
def test_calibration_changes_one_line_of_the_config(tmp_path: Path, written: bool) -> None:
    file = tmp_path / "run.yaml"
    text = "# kept\n" + to_yaml(base_run())
    line = "duration_exponent: 0.5\n"
    assert line in text
    file.write_text(text if written else text.replace(line, ""), encoding="utf-8")
    before = [kept for kept in file.read_text().splitlines() if "duration_exponent" not in kept]
    told = write_exponent(file, Exponent(0.41234, Interval(0.3, 0.5), Interval(0.2, 0.6)))
    lines = file.read_text().splitlines()
    changed = [kept for kept in lines if kept not in before]
    assert [kept for kept in lines if kept in before] == before
    assert changed == [
        "duration_exponent: 0.412  # fitted by check transfer, 95 % over seeds [0.300, 0.500], "
        "of the line [0.200, 0.600]"
    ]
    assert load_config(file).rules.duration_exponent == 0.412
    assert "0.412" in told


@pytest.mark.parametrize("value", [-0.1, 1.2, math.nan])
def test_an_exponent_that_the_rules_refuse_leaves_the_config(tmp_path: Path, value: float) -> None:
    file = tmp_path / "run.yaml"
    text = to_yaml(base_run())
    file.write_text(text, encoding="utf-8")
    with pytest.raises(CompletedPError, match="left as it is"):
        write_exponent(file, Exponent(value, *[Interval(math.nan, math.nan)] * 2))
    assert file.read_text(encoding="utf-8") == text


def test_a_figure_marks_what_diverged_and_averages_it_nowhere() -> None:
    """One seed of two diverges at +1: a cross at the top there, and no point of the curve."""

    def losses(point: Point) -> float:
        labels = point.labels
        x, size = labels["log2_multiple"], labels["size"]
        gone = size == 64 and x >= 1 and labels["seed"] == 2
        return math.inf if gone else 3.0 + 0.1 * x * x

    study = ladder(log2_multiples=(-1, 0, 1), window=0.3, max_added=0)
    found = analyse(study, "completedp", rows_of(study, losses))
    figure = Figure()
    draw_sweeps(figure, [found], study.settings)
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.get_lines() if line.get_label() != "_best"}
    assert list(lines["64"].get_xdata()) == [-1, 0]
    assert list(lines["32"].get_xdata()) == [-1, 0, 1]
    crosses = [line for line in axes.get_lines() if line.get_label() == "_diverged"]
    assert [list(line.get_xdata()) for line in crosses] == [[], [1]]
    assert crosses[1].get_marker() == "x"
    assert _row(found.sizes[1])[-1] == "+1"
    assert _row(found.sizes[0])[-1] == "none"
