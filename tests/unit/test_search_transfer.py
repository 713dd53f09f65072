"""Tokens at equal loss, the runs of a transfer study, and the configurations in examples/search."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure

from megatron_completedp.config.load import load_config
from megatron_completedp.config.recipe import Provenance, Recipe, save_recipe
from megatron_completedp.config.run import RunConfig
from megatron_completedp.core.ratios import Ratios
from megatron_completedp.errors import ConfigError
from megatron_completedp.search.access import Search
from megatron_completedp.search.compare_settings import CompareSettings
from megatron_completedp.search.saving import log_tokens_at, outside, saving
from megatron_completedp.search.settings import SearchSettings
from megatron_completedp.search.space import Space
from megatron_completedp.search.transfer import report
from megatron_completedp.search.transfer_figures import draw_transfer
from megatron_completedp.search.transfer_runs import TransferRuns
from megatron_completedp.search.transfer_settings import SizeSettings, TransferSettings
from megatron_completedp.study.results import Results
from megatron_completedp.study.settings import OutFlag, load_study

EXAMPLES = Path(__file__).parents[2] / "examples/search"
LEVELS = ("types", "types_x_depth", "full")
SAMPLERS = ("types_random", "types_tpe", "types_cmaes", "types_gp")
LOGS = (16.0, 17.0, 18.0, 19.0)


def base() -> RunConfig:
    return load_config(EXAMPLES / "base.yaml")


def recipe(path: Path, point: dict[str, float]) -> str:
    """A recipe of base.yaml with the type factors of `point`."""
    run = base()
    save_recipe(path, Recipe.of(Space.of(run, "types").apply(run, point), "types"))
    return str(path)


@pytest.fixture
def settings(tmp_path: Path) -> TransferSettings:
    return TransferSettings(
        run=str(EXAMPLES / "base.yaml"),
        recipes={"global": "", "recipe": recipe(tmp_path / "r.yaml", {"types.q.lr_mult": 0.5})},
        sizes={
            "proxy": SizeSettings(durations=(0.5, 1), reference=1),
            "target": SizeSettings(width=2, depth=2, batch=2, durations=(2, 4), reference=4),
        },
        heldout=("runs/search/data/heldout",),
        seeds=(1, 2),
    )


def curve(shift: float, noise: float = 0.0, slope: float = 0.2) -> dict[float, float]:
    """A loss that falls by `slope` nats per doubling, reached `shift` doublings earlier."""
    return {x: 6 - slope * (x - 16 + shift) + noise for x in LOGS}


@pytest.mark.parametrize(
    ("level", "expected"),
    [(6.0, 16.0), (5.9, 16.5), (5.4, 19.0), (6.01, math.nan), (5.39, math.nan)],
)
def test_tokens_at_a_loss_are_interpolated_and_never_extrapolated(
    level: float, expected: float
) -> None:
    assert log_tokens_at(curve(0), level) == pytest.approx(expected, nan_ok=True)


def test_the_first_crossing_counts_where_a_curve_is_not_monotone() -> None:
    assert log_tokens_at({0.0: 4, 1.0: 2, 2.0: 5, 3.0: 1}, 3) == 0.5
    assert log_tokens_at({0.0: math.inf, 1.0: 4, 2.0: 2}, 3) == 1.5
    # It starts below, so that the crossing is to the left of what was trained.
    assert math.isnan(log_tokens_at({0.0: 2, 1.0: 5, 2.0: 1}, 3))


@pytest.mark.parametrize("octaves", [0.0, 0.5, -0.75])
def test_the_ratio_is_the_shift_between_the_curves(octaves: float) -> None:
    found = saving([curve(0)] * 3, [curve(octaves)] * 3, 17.0)
    assert found.ratio == pytest.approx(2**octaves)
    # Without noise every seed says the same.
    assert (found.interval.low, found.interval.high) == pytest.approx([2**octaves] * 2)


def test_what_both_share_by_seed_is_no_uncertainty() -> None:
    """Negative control: noise of each curve's own widens the interval, common noise does not."""
    noise = np.random.default_rng(0).normal(0, 0.05, (2, 3))
    common = saving([curve(0, e) for e in noise[0]], [curve(0.5, e) for e in noise[0]], 17.0)
    own = saving([curve(0, e) for e in noise[0]], [curve(0.5, e) for e in noise[1]], 17.0)
    assert common.interval.high - common.interval.low < 1e-9
    assert own.interval.high - own.interval.low > 0.05
    assert own.interval.low <= own.ratio <= own.interval.high


def test_three_seeds_cover_the_ratio() -> None:
    """95 of 100 intervals hold what is true; a bootstrap's over three seeds would in 67."""
    generator, held, count = np.random.default_rng(1), 0, 400
    for noise in generator.normal(0, 0.02, (count, 2, 3)):
        found = saving(
            [curve(0, e) for e in noise[0]], [curve(0.5, e) for e in noise[1]], 17.0
        ).interval
        held += found.low <= 2**0.5 <= found.high
    assert 0.92 <= held / count <= 0.98


def test_a_seed_without_a_ratio_leaves_no_interval() -> None:
    found = saving([curve(0)] * 3, [curve(0.5), curve(0.5), curve(1.2)], 17.0)
    assert found.ratio > 1
    assert f"{found.interval:.2f}" == "-"


def test_what_was_not_trained_has_no_ratio_but_a_reason() -> None:
    better = saving([curve(0)] * 2, [curve(5)] * 2, 17.0)
    assert math.isnan(better.ratio)
    assert math.isnan(better.interval.low)
    assert "add shorter ones" in outside(curve(5), better.level)
    assert "add longer ones" in outside(curve(-5), better.level)
    assert outside({16.0: math.inf, 17.0: 3.0}, 5.0) == "a run diverged"


@pytest.mark.parametrize(("saved", "passed"), [(0.0, False), (0.05, False), (0.5, True)])
def test_the_verdict_is_about_the_ratio_and_its_interval(
    settings: TransferSettings, tmp_path: Path, saved: float, passed: bool
) -> None:
    """A recipe that saves nothing, or no more than the seeds scatter, does not pass."""
    size = SizeSettings(durations=(0.5, 1, 2), reference=1)
    settings = replace(settings, sizes={"proxy": size}, seeds=(1, 2, 3, 4))
    runs = TransferRuns(settings, base(), tmp_path)
    results = Results(tmp_path / "results.jsonl", runs.identity)
    for duration in size.durations:
        for seed in settings.seeds:
            # By 0.1 octaves up and down do the seeds differ in what they say of a recipe that is
            # not the baseline itself.
            shifts = {"global": 0.0, "recipe": saved + 0.1 * (-1) ** seed * (saved > 0)}
            for name, shift in shifts.items():
                loss = 6 - 0.2 * (math.log2(duration) + shift)
                row = {"id": runs.point(name, "proxy", duration, seed).id, "loss": loss}
                results.append({**row, "diverged": False})
    found = report(runs, results, command="search transfer")
    assert found.passed is passed
    one = TransferRuns(replace(settings, seeds=(1,)), base(), tmp_path)
    assert not report(one, results, command="search transfer").passed, "one seed has no scatter"
    ratio, lowest = found.findings
    assert ratio.value == pytest.approx(2**saved)
    assert ratio.passed, "the point estimate alone is at least the ratio asked for"
    assert lowest.value <= ratio.value
    assert "point estimate; 95 % interval [" in ratio.note


def test_the_figure_has_the_ratio_with_its_interval() -> None:
    curves = {"proxy": {"global": [curve(0)] * 3, "types": [curve(s) for s in (0.4, 0.5, 0.6)]}}
    found = saving(curves["proxy"]["global"], curves["proxy"]["types"], 17.0)
    figure = Figure()
    draw_transfer(figure, curves, {"proxy": found})
    texts = [text.get_text() for text in figure.axes[0].texts]
    # 2^0.5, and Student's t for 0.1 octaves over three seeds: 4.303 * 0.1 / sqrt(3) = 0.248.
    assert "1.41x [1.19, 1.68]" in texts


def test_recipes_are_carried_alike(settings: TransferSettings, tmp_path: Path) -> None:
    runs = TransferRuns(settings, base(), tmp_path)
    pair = [runs.config(name, "target", 4) for name in settings.recipes]
    assert [each.ratios for each in pair] == [Ratios(m_N=2, m_L=2, m_B=2, m_D=4)] * 2
    assert [each.data.valid for each in pair] == [settings.heldout] * 2
    assert replace(pair[1], multipliers=pair[0].multipliers) == pair[0]
    assert pair[0].evaluation.interval == pair[0].steps


def test_runs_with_the_same_numbers_are_shared(settings: TransferSettings, tmp_path: Path) -> None:
    def runs(settings: TransferSettings) -> set[str]:
        return {point.id for point in TransferRuns(settings, base(), tmp_path).points()}

    assert len(runs(settings)) == 2 * 4 * 2
    same = replace(settings, recipes={"global": "", "recipe": ""})
    assert len(runs(same)) == 4 * 2


def test_the_longest_run_of_a_seed_comes_first(settings: TransferSettings, tmp_path: Path) -> None:
    first, *_, last = TransferRuns(settings, base(), tmp_path).points()
    assert (first.labels["seed"], last.labels["seed"]) == (1, 2)
    assert first.config.train_tokens == 4 * base().train_tokens
    assert last.config.train_tokens == base().train_tokens / 2


def test_a_recipe_of_another_base_is_refused(settings: TransferSettings, tmp_path: Path) -> None:
    other = base()
    wider = replace(other, training=replace(other.training, train_tokens=204_800))
    with pytest.raises(ConfigError, match=r"recipes\.recipe: .* was tuned at another base"):
        TransferRuns(settings, wider, tmp_path)


def test_a_split_that_a_search_chose_by_is_refused(
    settings: TransferSettings, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="heldout has runs/search/data/valid"):
        TransferRuns(replace(settings, heldout=base().data.valid), base(), tmp_path)


def test_a_seed_that_a_search_chose_by_is_refused(
    settings: TransferSettings, tmp_path: Path
) -> None:
    run = replace(base(), seed=7)
    of = Recipe.of(run, "types", Provenance(study="types", seeds=(8, 9)))
    save_recipe(tmp_path / "searched.yaml", of)
    settings = replace(settings, recipes={"global": "", "recipe": str(tmp_path / "searched.yaml")})
    TransferRuns(settings, run, tmp_path)
    with pytest.raises(ConfigError, match="seeds has 7, 9, which trials"):
        TransferRuns(replace(settings, seeds=(1, 7, 9)), run, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judged": "types"}, "judged is 'types'; expected one of the recipes global, recipe"),
        ({"judged": "global"}, "name two different recipes"),
        ({"heldout": ()}, "heldout is empty"),
        ({"seeds": (1, 1)}, "expected different seeds"),
        ({"sizes": {}}, "sizes is empty"),
    ],
)
def test_bad_settings_are_refused(
    settings: TransferSettings, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(settings, **changes)


@pytest.mark.parametrize(
    ("durations", "reference", "message"),
    [((1.0,), 1.0, "two or more"), ((1.0, 2.0), 3.0, "one of the durations 1, 2")],
)
def test_a_size_without_a_curve_is_refused(
    durations: tuple[float, ...], reference: float, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        SizeSettings(durations=durations, reference=reference)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of examples/search with a recipe for every search that others start from."""
    folder = tmp_path_factory.mktemp("examples")
    for file in EXAMPLES.glob("*.yaml"):
        shutil.copy(file, folder)
    for name in yaml.safe_load((folder / "transfer.yaml").read_text())["recipes"]:
        recipe(folder / name / "recipe.yaml", {})
    return folder


@pytest.mark.parametrize("name", ["global", *LEVELS, *SAMPLERS])
def test_every_example_is_a_search(examples: Path, tmp_path: Path, name: str) -> None:
    found, out, _ = load_study(
        SearchSettings,
        ["--config", str(examples / f"{name}.yaml")],
        prog="search",
        description="",
        extra=OutFlag,
    )
    assert out == Path("examples/search") / name
    objective = Search(found, tmp_path).objective()
    assert objective.base.train_tokens == 409_600
    assert objective.base.base in (None, base().scale)
    assert found.heldout == ("runs/search/data/heldout",)


def test_a_start_that_was_chosen_by_its_seed_is_refused(tmp_path: Path) -> None:
    """Its first run is low by luck; with another seed the same search may begin."""
    shutil.copy(EXAMPLES / "tuned.yaml", tmp_path)
    of = Recipe.of(base(), "global", Provenance(study="global", seeds=(2233, 2234)))
    save_recipe(tmp_path / "global/recipe.yaml", of)
    settings = SearchSettings(run=str(tmp_path / "tuned.yaml"))
    with pytest.raises(ConfigError, match=r"seed is 2234, .* such as seed: 3234"):
        Search(settings, tmp_path).objective()
    file = tmp_path / "tuned.yaml"
    file.write_text(file.read_text().replace("seed: 2234", "seed: 2000"))
    with pytest.raises(ConfigError, match=r"seed is 2000, and runs count up from it to 2233, "):
        Search(settings, tmp_path).objective()
    file.write_text(file.read_text().replace("seed: 2000", "seed: 2235"))
    assert Search(settings, tmp_path).objective().base.seed == 2235


def test_the_example_of_transfer_reaches_16_times_the_compute(
    examples: Path, tmp_path: Path
) -> None:
    found, _, _ = load_study(
        TransferSettings,
        ["--config", str(examples / "transfer.yaml")],
        prog="search",
        description="",
        extra=OutFlag,
        paths=("run", "recipes"),
    )
    runs = TransferRuns(found, load_config(found.run), tmp_path)
    target = runs.config("types", "target", found.sizes["target"].reference)
    compute = target.model.parameters * target.train_tokens
    assert compute >= 16 * base().model.parameters * base().train_tokens
    assert min(target.ratios.m_N, target.ratios.m_L, target.ratios.m_B, target.ratios.m_D) > 1


def test_the_example_of_compare_names_the_searches(examples: Path) -> None:
    found, _, _ = load_study(
        CompareSettings,
        ["--config", str(examples / "compare.yaml")],
        prog="search",
        description="",
        extra=OutFlag,
        paths=("run", "studies"),
    )
    paths = [Path(path) for paths in found.studies.values() for path in paths]
    assert {path.parent.name for path in paths} == {"types", *SAMPLERS}
    assert {path.parents[1] for path in paths} == {examples}
