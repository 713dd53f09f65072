"""What a recipe says of the runs behind its losses, and that settings belong to their study."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("optuna")


from megatron_completedp.errors import ConfigError
from megatron_completedp.search import access, export
from megatron_completedp.search.access import Search, read
from megatron_completedp.search.heldout import check_heldout, check_seeds
from megatron_completedp.search.incumbent import Incumbent
from megatron_completedp.study.results import Results
from megatron_completedp.study.settings import masked
from megatron_completedp.study.tasks import Point
from tests.search_report_samples import finished_study, search

BEST = Incumbent({}, 3.0, 0.01, trials=(4,), diverged=0)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Point]:
    """The points that `train_points` was given; the second seed of each call diverges."""
    given: list[Point] = []

    def train(points: Sequence[Point], results: Results, **_: Any) -> None:
        given.extend(points)
        for index, point in enumerate(points):
            row = {"loss": None if index == 1 else 3.0, "diverged": index == 1}
            results.append({"id": point.id, **point.labels, **row})

    monkeypatch.setattr(export, "train_points", train)
    return given


def test_heldout_losses_are_of_the_files_that_were_named(
    tmp_path: Path, trained: list[Point]
) -> None:
    of = search(tmp_path)
    settings = replace(of.settings, heldout=("other",))
    losses = export.heldout_losses(of.objective(), settings, BEST, out=tmp_path, runs=3)
    assert [point.config.data.valid for point in trained] == [("other",)] * 3
    # No trial comes near these seeds; the run that diverged has no loss that a mean could hide.
    assert list(losses) == [point.config.seed for point in trained]
    assert list(losses.values()) == [3.0, math.inf, 3.0]
    assert min(losses) >= of.objective().base.seed + 10_000
    another = replace(settings, heldout=("another",))
    with pytest.raises(ConfigError, match=r"holds results of another config: .*valid"):
        export.heldout_losses(of.objective(), another, BEST, out=tmp_path, runs=3)
    base = of.objective()
    fewer = replace(base.base, evaluation=replace(base.base.evaluation, samples=8))
    with pytest.raises(ConfigError, match=r"samples was 512, is now 8"):
        export.heldout_losses(replace(base, base=fewer), settings, BEST, out=tmp_path, runs=3)


def test_heldout_losses_are_of_the_point_itself(tmp_path: Path, trained: list[Point]) -> None:
    """Another search in the same folder may have a best trial of the same number."""
    of = search(tmp_path)
    settings = replace(of.settings, heldout=("other",))
    objective = of.objective()
    moved = replace(BEST, params={objective.space.names[0]: 0.5})
    for best in (BEST, moved, BEST):
        export.heldout_losses(objective, settings, best, out=tmp_path, runs=1)
    first, second, again = trained
    assert first.id == again.id != second.id
    assert first.config.seed == second.config.seed


def test_a_recipe_that_diverges_on_a_fresh_seed_has_no_mean(
    tmp_path: Path, trained: list[Point], monkeypatch: pytest.MonkeyPatch
) -> None:
    of = search(tmp_path, level="global")
    manifest = SimpleNamespace(tokenizer_sha256="hash")
    monkeypatch.setattr(export, "load_manifest", lambda prefix: manifest)
    settings = replace(of.settings, heldout=("other",))
    written = export.export(
        finished_study(of, 8),
        of.objective(),
        settings,
        out=tmp_path,
        recipe=tmp_path / "recipe.yaml",
        heldout_runs=3,
    ).provenance
    assert (written.heldout_loss, written.heldout_loss_standard_error) == (None, None)
    assert written.heldout_seeds == tuple(point.config.seed for point in trained)
    assert written.heldout_diverged == (trained[1].config.seed,)


def test_the_study_is_not_read_with_other_settings(tmp_path: Path) -> None:
    """A recipe would multiply another base by the point that this one's trials found."""
    of = search(tmp_path, level="global")
    of.join("worker", type("Stop", (), {"value": False})())
    assert read(of).study_name == "search"
    for changes in ({"level": "types"}, {"seeds": 2}, {"sampler": "random"}):
        with pytest.raises(ConfigError, match="is another search than these settings"):
            read(Search(replace(of.settings, **changes), tmp_path))


def test_the_study_is_not_read_with_another_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe would say that the text of today is the one that was searched."""
    of = search(tmp_path, level="global")
    text = {"runs/search/data/train": "a" * 64}
    monkeypatch.setattr(access, "text_of", lambda config: text)
    of.join("worker", type("Stop", (), {"value": False})())
    assert read(of).study_name == "search"
    text["runs/search/data/train"] = "b" * 64
    with pytest.raises(ConfigError, match=r"data/train was aaaaaaaaaaaa\.\.\., is"):
        read(of)
    text.clear()  # a page is drawn where the text is not
    assert read(of).study_name == "search"


def test_text_and_seeds_that_trials_had_are_refused(tmp_path: Path) -> None:
    data = search(tmp_path).objective().base.data
    check_heldout(data, ("runs/search/data/heldout",))
    for seen in ("runs/search/data/train", "./runs/search/../search/data/valid"):
        with pytest.raises(ConfigError, match=f"heldout has {seen}"):
            check_heldout(data, (seen,))
    check_seeds((1, 2, 3), {4, 5})
    with pytest.raises(ConfigError, match=r"seeds has 2, 3, .* from 6 on"):
        check_seeds((1, 2, 3), {2, 3, 4, 5})


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:secret@host:5432/name", "postgresql://***@host:5432/name"),
        ("postgres//me:se@cret@host/name", "postgres//me:***@host/name"),
        ("run --database.url 'a://b:secret@c/d' --trials 3", "run --database.url 'a://***@c/d' "
         "--trials 3"),
        ("a://host/name?password=secret&x=1", "a://host/name?password=***&x=1"),
        ("run --config a@b.yaml --out c:/d", "run --config a@b.yaml --out c:/d"),
    ],
)  # fmt: skip
def test_passwords_are_not_shown(text: str, shown: str) -> None:
    assert masked(text) == shown
