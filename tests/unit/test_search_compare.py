"""Samplers at equal budget: which studies may be compared, and what is said of them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import optuna
import pytest
from scipy import stats

from megatron_completedp.errors import ConfigError
from megatron_completedp.search import compare
from megatron_completedp.search.access import Search
from megatron_completedp.search.compare import _curves, _findings, _paired, _table, _welch
from megatron_completedp.search.compare_settings import CompareSettings
from megatron_completedp.search.held_points import HeldPoints
from megatron_completedp.search.history import History
from megatron_completedp.search.surrogate import synthetic
from megatron_completedp.search.trials_file import FILE
from tests.search_report_samples import RUN, finished_study, search

TRIALS = 70


@pytest.fixture(scope="module")
def trust(tmp_path_factory: pytest.TempPathFactory) -> tuple[Search, optuna.Study]:
    of = search(tmp_path_factory.mktemp("trust"))
    return of, finished_study(of, TRIALS)


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
    # What stands high in the tree comes first, and no error lists all of 86 numbers.
    with pytest.raises(ConfigError, match=r"level was types, is now global.* and \d\d more\."):
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
    best = History(study, of.objective().space).held[-1].point
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
    swapped = {"trust_region": studies["random"], "random": studies["trust_region"]}
    with pytest.raises(ConfigError, match=r"studies\.trust_region has studies of the sampler rand"):
        HeldPoints(replace(fine, studies=swapped), tmp_path)
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
        compare,
        "simulated",
        lambda *_, region, options, **__: given.update(region, options=options) or {}["stop"],
    )
    with pytest.raises(KeyError, match="stop"):
        compare.run(settings, tmp_path, command="")
    identity = trust[1].user_attrs["identity"]
    assert given.pop("options") == {
        "trust_region": identity["proposals"]["options"],
        "random": {},
    }
    assert given == trust[0].objective().space.trust_region()
    assert {len(set(given[name].values())) for name in ("radius", "kinds")} == {2, 7}


def test_samplers_are_compared_on_a_surrogate(tmp_path: Path) -> None:
    settings = CompareSettings(samplers=("trust_region", "random"), runs=20, repeats=3)
    found = compare.run(settings, tmp_path, command="search compare")
    assert [figure.name for figure in found.figures] == ["surrogate"]
    (table,) = found.tables
    assert [row[0] for row in table.rows] == ["trust_region", "random"]
    # Random points of 79 dimensions fall off a cliff: what is held is the base run itself.
    assert table.rows[1][-2] == "+0.0000"
    difference, lower = found.findings
    assert not difference.held
    # Fewer runs than a round: neither has moved, and a tie is no gain.
    assert difference.value == lower.value == 0
    assert not lower.passed
    rows = (tmp_path / "surrogate.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    assert [len(json.loads(row)["gains"]) for row in rows] == [20] * 6
    # Kept repeats are not simulated again, and more are joined to them.
    again = compare.run(replace(settings, repeats=4), tmp_path, command="search compare")
    after = (tmp_path / "surrogate.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    assert after[:6] == rows
    assert len(after) == 8
    assert "over 4 pairs" in again.findings[1].note


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samplers": ("random", "tpe")}, "expected trust_region"),
        ({"repeats": 2}, "repeats is 2"),
        ({"budgets": (0, 10)}, "expected trials, 1 or more"),
        ({"workers": -1}, "workers is -1 and ranks 1"),
        ({"ranks": 0}, "workers is 0 and ranks 0"),
        ({"seeds": (1, 1)}, "expected different seeds"),
        (
            {
                "studies": MappingProxyType({"trust_region": ("a",), "tpe": ()}),
                "run": "run.yaml",
                "heldout": ("heldout",),
            },
            r"studies\.tpe is empty",
        ),
        (
            {
                "studies": MappingProxyType({"trust_region": ("a", "b"), "tpe": ("c",)}),
                "run": "run.yaml",
                "heldout": ("heldout",),
            },
            "2 of trust_region, 1 of tpe; one study's seeds",
        ),
        (
            {"studies": MappingProxyType({"trust_region": ("a",), "tpe": ("b",)})},
            "run, heldout, seeds or budgets is empty",
        ),
    ],
)
def test_a_comparison_of_nothing_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CompareSettings(**changes)  # type: ignore[arg-type]


def test_the_interval_of_a_difference_is_students() -> None:
    """Pairs lose what they share; studies have only their own scatter (scipy's tests, here)."""
    ours, theirs = [1.0, 2.0, 4.0], [0.0, 1.1, 1.2]
    paired = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    found = _paired(ours, theirs)
    assert (found.low, found.high) == pytest.approx((paired.low, paired.high))
    assert math.isnan(_paired(ours[:1], theirs[:1]).low)
    welch = stats.ttest_ind(ours, theirs[:2], equal_var=False).confidence_interval(0.95)
    found = _welch(ours, theirs[:2])
    assert (found.low, found.high) == pytest.approx((welch.low, welch.high))


@pytest.mark.parametrize("repeats", [1, 2])
def test_a_held_point_that_diverges_fails_and_is_said(repeats: int) -> None:
    """With one study or several, on the last budget; it is no crash after all the training."""
    settings = CompareSettings(
        run="run.yaml",
        studies=dict.fromkeys(("trust_region", "tpe"), ("file",) * repeats),
        heldout=("heldout",),
        budgets=(2,),
    )
    gained = {"trust_region": [{2: 0.1}, {2: -math.inf}], "tpe": [{2: 0.05}, {2: 0.04}]}
    difference, lower = _findings(settings, gained, "training")
    assert difference.value == -math.inf
    assert "a point that trust_region held diverged" in difference.note
    assert "tpe held" not in difference.note
    assert not lower.passed
    (row, _) = _table("training", _curves(gained), settings).rows
    assert row == ("trust_region", "-inf", "-")
