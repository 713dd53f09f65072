"""A search's history, its export, what the report reads off it, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import optuna
import pytest
from matplotlib.figure import Figure
from optuna.trial import TrialState, create_trial

from megatron_completedp.errors import ConfigError, DataError
from megatron_completedp.search.access import Search
from megatron_completedp.search.history import Estimate, History
from megatron_completedp.search.importance import importance
from megatron_completedp.search.incumbent import incumbent
from megatron_completedp.search.report import _limits, report
from megatron_completedp.search.report_figures import (
    Cell,
    cell,
    draw_cliffs,
    draw_progress,
    profiles,
    short,
)
from megatron_completedp.search.report_tables import changes_table
from megatron_completedp.search.status import status
from megatron_completedp.search.trials_file import FILE, read_export
from megatron_completedp.study.page import write_report
from megatron_completedp.study.report import Report
from tests.search_report_samples import NOISE, STEEP, finished_study, search, surrogate_of

TRIALS = 70


@pytest.fixture(scope="module")
def trust(tmp_path_factory: pytest.TempPathFactory) -> tuple[Search, optuna.Study]:
    of = search(tmp_path_factory.mktemp("trust"))
    return of, finished_study(of, TRIALS)


def history(of: Search, study: optuna.Study) -> History:
    return History(study, of.objective().space)


def made(of: Search) -> Report:
    return report(of, target=None, command="search report")


def test_the_export_reads_back_as_the_study(trust: tuple[Search, optuna.Study]) -> None:
    of, study = trust
    again = read_export(of.out / FILE)
    assert len(again.trials) == len(study.trials) == TRIALS + 1
    for old, new in zip(study.trials, again.trials, strict=True):
        assert (new.number, new.state, new.value) == (old.number, old.state, old.value)
        assert new.system_attrs == old.system_attrs
        # A millionth of a nat: half of the last of six digits.
        assert new.params == pytest.approx(old.params, abs=5.1e-7)
    ours, theirs = history(of, study), history(of, again)
    assert [held.since for held in ours.held] == [held.since for held in theirs.held]
    assert ours.noise == pytest.approx(theirs.noise)


def test_the_export_is_small_and_names_no_machine(trust: tuple[Search, optuna.Study]) -> None:
    text = (trust[0].out / FILE).read_text(encoding="utf-8")
    assert "secret" not in text
    # 76 numbers of at most 9 characters, and what the run found.
    assert len(text) < 1200 * (TRIALS + 8)


@pytest.mark.parametrize("text", ["", "{}\n", '{"study": "x"}\n[1]\n', "no JSON\n"])
def test_what_is_no_export_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"trials\.jsonl is not the export of a search"):
        read_export(tmp_path / FILE)


def test_an_export_of_another_search_is_refused(trust: tuple[Search, optuna.Study]) -> None:
    with pytest.raises(ConfigError, match=r"level was types, is now global"):
        made(search(trust[0].out, level="global"))


def test_the_last_best_point_is_the_samplers(trust: tuple[Search, optuna.Study]) -> None:
    of, study = trust
    found, best = history(of, study), incumbent(study)
    assert best is not None
    assert len(found.held) > 1
    assert found.held[0].point == dict.fromkeys(found.space.names, 0.0)
    assert found.held[-1].point == best.params
    assert found.best_after(found.held[1].since - 1) == found.held[0].point
    assert found.best_after(0) is None


def test_the_run_that_a_point_was_chosen_for_is_not_averaged(
    trust: tuple[Search, optuna.Study],
) -> None:
    of, study = trust
    found = history(of, study)
    point = dict(found.held[-1].point)
    values = {
        trial.user_attrs["replicate"]: trial.value or 0.0
        for trial in study.trials
        if trial.params == point and trial.value is not None
    }
    estimate = found.estimate(point)
    assert estimate.mean == pytest.approx(fmean(values[r] for r in values if r))
    assert not estimate.biased
    # Within four standard errors of the surrogate's truth.
    truth = surrogate_of(found.space.names).loss(point)
    assert abs(estimate.mean - truth) < 4 * estimate.standard_error


def with_another_run(study: optuna.Study, point: Mapping[str, float], **facts: Any) -> optuna.Study:
    """A copy of the study, with one more run of `point`, replicate 9 of it."""
    copied = optuna.create_study(sampler=study.sampler, study_name="copy")
    for name, value in study.user_attrs.items():
        copied.set_user_attr(name, value)
    copied.add_trials(study.get_trials(deepcopy=False))
    distributions = study.trials[0].distributions
    diverged = facts.get("diverged", False)
    copied.add_trial(
        create_trial(
            params={**point},
            distributions=distributions,
            value=facts["value"],
            user_attrs={"replicate": 9, "diverged": diverged},
        )
    )
    return copied


def test_a_run_off_the_cliff_is_no_sample_of_the_noise(trust: tuple[Search, optuna.Study]) -> None:
    of, study = trust
    before = history(of, study)
    point = before.held[-1].point
    fallen = with_another_run(study, point, value=before.estimate(point).mean + 1.6)
    after = history(of, fallen)
    assert after.noise == before.noise
    assert after.estimate(point) == before.estimate(point)
    assert after.gain(point) == before.gain(point)
    near = history(of, with_another_run(study, point, value=before.estimate(point).mean + 0.1))
    assert near.noise[1] == before.noise[1] + 1


def test_diverged_runs_of_the_best_point_are_told(trust: tuple[Search, optuna.Study]) -> None:
    of, study = trust
    point = history(of, study).held[-1].point
    worse = with_another_run(study, point, value=math.log(1024), diverged=True)
    found = incumbent(worse)
    assert found is not None
    assert found.params == point
    assert found.diverged == 1
    assert "times, 1 more diverged)" in status(worse, of.settings, target=None)
    limits = _limits(history(of, worse), point, None)
    assert any(text.startswith("1 more runs of the best point diverged") for text in limits)
    assert not any("diverged" in text for text in _limits(history(of, study), point, None))


def test_the_noise_is_that_of_the_surrogate(trust: tuple[Search, optuna.Study]) -> None:
    noise, freedom = history(*trust).noise
    # The chi distribution's spread is 1 / sqrt(2 freedom) of the value; four of them.
    assert noise == pytest.approx(NOISE, rel=4 / math.sqrt(2 * freedom))


def test_an_estimate_of_one_chosen_run_has_no_interval(tmp_path: Path) -> None:
    of = search(tmp_path, level="global", sampler="random")
    found = history(of, finished_study(of, 20))
    best = found.estimate(found.held[-1].point)
    assert best.biased
    assert math.isnan(best.interval.low)
    well = [trial.value for trial in found.well]
    assert best.mean == min(well)
    result = made(of)
    assert not result.passed
    assert "the base run is no trial" in result.findings[0].note


def test_a_dimension_on_its_bound_is_named_first(trust: tuple[Search, optuna.Study]) -> None:
    of, study = trust
    found = history(of, study)
    point = dict(found.held[-1].point)
    assert found.space.on_bounds(point) == []
    last = found.space.dimensions[-1]
    # As read back from trials.jsonl, which rounds.
    point[last.name] = round(last.high, 6)
    assert found.space.on_bounds(point) == [last.name]
    row = changes_table(point, found.space, None).rows[0]
    assert row[0] == short(last.name)
    assert row[3] == "0.25 to 4, on it"


def test_intervals_widen_with_few_degrees_of_freedom() -> None:
    few = Estimate(3.0, 4, biased=False, noise=0.01, freedom=2)
    many = Estimate(3.0, 4, biased=False, noise=0.01, freedom=1000)
    # Student's t at 0.975: 4.303 for 2 degrees of freedom, 1.962 for 1000.
    assert few.interval.high - few.mean == pytest.approx(4.303 * 0.005, rel=1e-3)
    assert many.interval.high - many.mean == pytest.approx(1.962 * 0.005, rel=1e-3)


def test_a_search_that_found_something_passes(trust: tuple[Search, optuna.Study]) -> None:
    result = made(trust[0])
    assert result.passed
    assert [figure.name for figure in result.figures] == [
        "progress",
        "importance",
        "multipliers",
        "cliffs",
    ]
    assert not any("on their bounds" in text for text in result.exceptions)
    (cost,) = (table for table in result.tables if table.title == "Cost")
    assert cost.rows[-1][:3] == ("in all", str(TRIALS + 1), f"{TRIALS * 2.8e11:.3g}")


def test_the_base_run_is_drawn_below_the_best_so_far(trust: tuple[Search, optuna.Study]) -> None:
    """Both with their bands; the runs that a point was chosen by are in neither."""
    found, figure = history(*trust), Figure()
    draw_progress(figure, found)
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    assert set(lines["base run"].get_ydata()) == {found.start.mean}
    assert lines["best so far"].get_ydata()[-1] == found.estimate(found.held[-1].point).mean
    base, best = axes.collections
    (bottom, _, top) = np.unique(np.r_[base.get_paths()[0].vertices[:, 1], found.start.mean])
    assert (top - bottom) / 2 == pytest.approx(found.start.interval.high - found.start.mean)
    assert len(best.get_paths()) == 1


def test_the_cliff_map_has_every_diverged_run_and_the_cliff_before_it(tmp_path: Path) -> None:
    """The first dimension diverges from 1.2 nats on; a random search goes up to 2.3."""
    of = search(tmp_path, level="global", sampler="random")
    study = finished_study(of, 60)
    found, figure = history(of, study), Figure()
    first = found.space.names[0]
    draw_cliffs(figure, found, {first: STEEP}, found.held[-1].point)
    (axes,) = figure.axes
    fallen = [trial.params[first] for trial in found.finished if trial.user_attrs["diverged"]]
    crosses, cliff, best = axes.lines[:3]
    assert len(fallen) > 1
    assert list(crosses.get_xdata()) == pytest.approx([value / math.log(2) for value in fallen])
    assert set(cliff.get_xdata()) == {1.2 / math.log(2)}
    assert list(best.get_xdata()) == [found.held[-1].point[first] / math.log(2)]
    # Runs that ended well are on this side of it.
    bar = axes.patches[0]
    assert bar.get_x() + bar.get_width() < 1.2 / math.log(2) < min(crosses.get_xdata())


def test_a_search_whose_sampler_has_options_is_reported(tmp_path: Path) -> None:
    """In the settings and in JSON they are floats; the sampler counts with some of them."""
    of = search(tmp_path, level="global", round_size=3, start_replicates=2)
    finished_study(of, 12)
    sampler = made(of).settings["sampler"]
    # Defaults too: a later version may have others.
    assert sampler.startswith("trust_region, seed 0, round_size 3.0, linear_step True, ")
    assert "start_replicates 2.0, confirm 3" in sampler


def test_searches_that_found_nothing_fail(tmp_path: Path) -> None:
    """Negative control: on noise alone the best point is the start, or within its noise."""
    passed = 0
    for seed in range(8):
        of = search(tmp_path / str(seed), level="global")
        finished_study(of, 100, still=True, seed=seed)
        passed += made(of).passed
    assert passed <= 1  # 0 of 24 with range(24)


def test_a_search_without_a_good_trial_is_refused(tmp_path: Path) -> None:
    of = search(tmp_path, level="global")
    finished_study(of, 0)
    with pytest.raises(ConfigError, match="no trial of 'search' has ended well"):
        made(of)


def test_the_files_of_every_level_are_drawn(tmp_path: Path) -> None:
    of = search(tmp_path, level="types_x_depth")
    finished_study(of, 30)
    result = made(of)
    write_report(tmp_path, result)
    assert "profiles" in [figure.name for figure in result.figures]
    for figure in result.figures:
        assert (tmp_path / f"{figure.name}.png").stat().st_size > 10_000
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "secret" not in text


def test_importance_finds_what_matters(tmp_path: Path) -> None:
    of = search(tmp_path, level="global", sampler="qmc")
    found = history(of, finished_study(of, 120))
    weights = importance(found, ceiling=math.log(1024))
    assert weights is not None
    first, *others = found.space.names
    steep = {name for index, name in enumerate(others, 1) if index % 10 == 0}
    assert weights.nats[first] > weights.chance
    flat = [weights.nats[name] for name in others if name not in steep]
    assert weights.nats[first] > 2 * max(flat)
    assert weights.predicted > 0.5


def test_importance_on_noise_is_not_above_chance(tmp_path: Path) -> None:
    """Negative control: where nothing matters, left-out trials are not predicted."""
    of = search(tmp_path, level="global", sampler="qmc")
    weights = importance(history(of, finished_study(of, 60, still=True)), ceiling=7.0)
    assert weights is not None
    assert weights.predicted < 0.1
    # The mean of ten maxima; the eleventh is within twice of it.
    assert max(weights.nats.values()) < 2 * weights.chance


def test_too_few_trials_have_no_importance(tmp_path: Path) -> None:
    of = search(tmp_path, level="global")
    assert importance(history(of, finished_study(of, 5)), ceiling=7.0) is None


def test_a_repeated_trial_takes_no_place_of_its_own(tmp_path: Path) -> None:
    of = search(tmp_path, level="global")
    found = history(of, finished_study(of, 4))
    lost = optuna.trial.create_trial(state=TrialState.FAIL)
    again = optuna.trial.create_trial(value=3.0, system_attrs={"failed_trial": 5})
    found.study.add_trials([lost, again])
    assert history(of, found.study).places == {0: 1, 1: 2, 2: 3, 3: 4, 4: 5, 5: 6, 6: 6}


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("types.q.lr_mult", Cell("q", "lr")),
        ("types.up.one_minus_beta1_mult", Cell("up", "one_minus_beta1")),
        ("hyperparams.weight_decay", Cell("all modules", "weight_decay")),
        ("mlp_residual_mult", Cell("mlp branch", "residual")),
        ("depth.lr_mult.0", None),
        ("layers.q.lr_mult.1", None),
    ],
)
def test_every_dimension_has_its_place(name: str, place: Cell | None) -> None:
    assert cell(name) == place


def test_profiles_are_relative_to_their_mean() -> None:
    point = {"depth.lr_mult.0": 0.5, "depth.lr_mult.1": 0.1, "layers.q.lr_mult.0": 1.0}
    found = profiles({**point, "layers.q.lr_mult.1": 1.0, "types.q.lr_mult": 3.0})
    np.testing.assert_allclose(found["lr"]["all"], np.array([0.2, -0.2]) / math.log(2))
    np.testing.assert_allclose(found["lr"]["q"], [0, 0], atol=1e-12)
