"""A search's history, its export, what the report reads off it, and what it refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import optuna
import pytest
from matplotlib.figure import Figure
from optuna.trial import TrialState

from megatron_completedp.errors import ConfigError, DataError
from megatron_completedp.search import compare
from megatron_completedp.search.access import Search
from megatron_completedp.search.compare_settings import CompareSettings
from megatron_completedp.search.held_points import HeldPoints
from megatron_completedp.search.history import Estimate, History
from megatron_completedp.search.importance import importance
from megatron_completedp.search.incumbent import incumbent
from megatron_completedp.search.report import report
from megatron_completedp.search.report_figures import Cell, cell, draw_progress, profiles, short
from megatron_completedp.search.report_tables import changes_table
from megatron_completedp.search.surrogate import synthetic
from megatron_completedp.search.trials_file import FILE, read_export
from megatron_completedp.study.page import write_report
from megatron_completedp.study.report import Report
from tests.search_report_samples import NOISE, RUN, finished_study, search, surrogate_of

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


def test_the_noise_is_that_of_the_surrogate(trust: tuple[Search, optuna.Study]) -> None:
    noise, freedom = history(*trust).noise
    # The chi distribution's spread is 1 / sqrt(2 freedom) of the value; four of them.
    assert noise == pytest.approx(NOISE, rel=4 / math.sqrt(2 * freedom))


def test_an_estimate_of_one_chosen_run_has_no_interval(tmp_path: Path) -> None:
    of = search(tmp_path, level="global", sampler="random")
    found = history(of, finished_study(of, 20))
    best = found.estimate(found.held[-1].point)
    assert best.biased
    assert math.isnan(best.half_width)
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
    assert few.half_width == pytest.approx(4.303 * 0.005, rel=1e-3)
    assert many.half_width == pytest.approx(1.962 * 0.005, rel=1e-3)


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
    assert (top - bottom) / 2 == pytest.approx(found.start.half_width)
    assert len(best.get_paths()) == 1


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


def files(*searches: Search) -> dict[str, tuple[str, ...]]:
    """One study for each of the samplers."""
    return {of.settings.sampler: (str(of.out / FILE),) for of in searches}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Search:
    """A finished search by random draws, to be compared with `trust`."""
    of = search(tmp_path_factory.mktemp("random"), sampler="random")
    finished_study(of, TRIALS)
    return of


def test_studies_of_different_spaces_are_not_compared(
    trust: tuple[Search, optuna.Study], tmp_path: Path
) -> None:
    other = search(tmp_path, level="global", sampler="random")
    finished_study(other, 5)
    studies = {"trust_region": (str(trust[0].out / FILE),), "random": (str(tmp_path / FILE),)}
    settings = CompareSettings(
        run=str(RUN), studies=studies, heldout=("heldout",), samplers=("trust_region", "random")
    )
    with pytest.raises(ConfigError, match=r"space\.level was types, is now global"):
        HeldPoints(settings, tmp_path)
    with pytest.raises(ConfigError, match="heldout has runs/search/data/valid"):
        HeldPoints(replace(settings, heldout=("runs/search/data/valid",)), tmp_path)


def test_a_study_is_compared_by_what_it_held_at_each_budget(
    trust: tuple[Search, optuna.Study], drawn: Search, tmp_path: Path
) -> None:
    of, study = trust
    settings = CompareSettings(
        run=str(RUN),
        studies=files(of, drawn),
        samplers=("trust_region", "random"),
        budgets=(1, TRIALS),
        seeds=(1, 2),
        heldout=("heldout",),
    )
    held = HeldPoints(settings, tmp_path)
    best = history(of, study).held[-1].point
    rounded = {name: round(value, 6) for name, value in best.items()}
    rows: list[dict[str, Any]] = []
    for point in ({}, *held._held()):
        for seed in settings.seeds:
            loss = 3.5 - 0.1 * (point == rounded) + seed
            rows.append({"id": held.run(point, seed).id, "diverged": False, "loss": loss})
    gains = held.gains(rows)["trust_region"]
    # After one trial the start is not yet known: the base run would be used.
    np.testing.assert_allclose(gains, [[[0, 0], [0.1, 0.1]]], atol=1e-12)
    base = held.run({}, 2).id
    broken = [{**row, "diverged": row["diverged"] or row["id"] == base} for row in rows]
    with pytest.raises(ConfigError, match=r"base run .* diverged with seed 2"):
        held.gains(broken)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budgets": (10, TRIALS + 1)}, "'sample' has 70 trials, fewer than the budget of 71"),
        # The base run's seed, which is the first run's of every point.
        ({"seeds": (1, 1234)}, "seeds has 1234, which trials"),
    ],
)
def test_a_study_that_is_short_or_had_the_seeds_is_not_compared(
    trust: tuple[Search, optuna.Study],
    drawn: Search,
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
) -> None:
    studies = files(trust[0], drawn)
    fine = CompareSettings(run=str(RUN), studies=studies, heldout=("heldout",), budgets=(10,))
    HeldPoints(fine, tmp_path)
    with pytest.raises(ConfigError, match=message):
        HeldPoints(replace(fine, **changes), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 3}, "seeds was 1, is now 3"),
        ({"samples": 1024}, "samples was 512, is now 1024"),
        ({"proposals.prune": True}, "stopped trials early"),
        ({}, "studies.trust_region and studies.twice are of one sampler"),
    ],
)
def test_studies_that_were_given_unequal_amounts_are_not_compared(
    trust: tuple[Search, optuna.Study], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    of, _ = trust
    lines = (of.out / FILE).read_text(encoding="utf-8").splitlines()
    header = json.loads(lines[0])
    for path, value in change.items():
        *sections, name = path.split(".")
        tree = header["identity"]
        for section in sections:
            tree = tree[section]
        tree[name] = value
    other = tmp_path / FILE
    other.write_text("\n".join([json.dumps(header), *lines[1:]]) + "\n", encoding="utf-8")
    first = str(of.out / FILE)
    settings = CompareSettings(
        run=str(RUN),
        studies={"trust_region": (first,), "twice": (str(other),)},
        heldout=("heldout",),
        budgets=(10,),
        samplers=("trust_region", "random"),
    )
    with pytest.raises(ConfigError, match=message):
        HeldPoints(settings, tmp_path)
    if not change:
        twice = (first, str(other))
        with pytest.raises(ConfigError, match="two studies of one seed"):
            HeldPoints(replace(settings, studies={"trust_region": twice, "twice": twice}), tmp_path)


def test_the_surrogate_takes_as_many_trials_of_each_study(
    trust: tuple[Search, optuna.Study], drawn: Search, tmp_path: Path
) -> None:
    studies = files(trust[0], drawn)
    settings = CompareSettings(run=str(RUN), studies=studies, heldout=("heldout",), budgets=(5, 10))
    held = HeldPoints(settings, tmp_path)
    assert 10 < len(held._rows()) <= 2 * 10, "but for those out of the valley"
    assert sum(len(one.finished) for group in held.histories.values() for one in group) > 50


def test_the_surrogate_of_a_space_is_searched_in_its_radii_and_kinds(
    trust: tuple[Search, optuna.Study],
    drawn: Search,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    studies = files(trust[0], drawn)
    settings = CompareSettings(run=str(RUN), studies=studies, heldout=("heldout",), budgets=(10,))
    given: dict[str, Any] = {}
    monkeypatch.setattr(HeldPoints, "surrogate", lambda self: synthetic(2))
    monkeypatch.setattr(
        compare, "simulated", lambda *_, region, **__: given.update(region) or {}["stop"]
    )
    with pytest.raises(KeyError, match="stop"):
        compare.run(settings, tmp_path, command="")
    assert given == trust[0].objective().space.trust_region()
    assert {len(set(given[name].values())) for name in ("radius", "kinds")} == {2, 7}


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
