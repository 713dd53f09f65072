"""Which runs a transfer study wants, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from transfer_samples import base_run, ladder, parabola, rows_of

from megatron_completedp.check.ladder import next_multiple
from megatron_completedp.check.transfer_settings import TransferSettings
from megatron_completedp.core.ratios import Ratios
from megatron_completedp.errors import ConfigError
from megatron_completedp.study.results import Results


@pytest.mark.parametrize(
    ("axis", "size", "ratios"),
    [
        ("width", 32, Ratios()),
        ("width", 64, Ratios(m_N=2)),
        ("depth", 8, Ratios(m_L=4)),
        ("batch", 2, Ratios(m_B=0.25)),
        ("duration", 51200, Ratios(m_D=4)),
        ("joint", 2, Ratios(m_N=2, m_L=2, m_B=2, m_D=4)),
    ],
)
def test_an_axis_moves_its_ratio_alone(axis: str, size: int, ratios: Ratios) -> None:
    assert ladder(axis=axis, sizes=(size, 3 * size)).sized(size).ratios == ratios


def test_width_grows_by_heads_with_the_mlp_in_proportion() -> None:
    base = base_run(**{"model.num_query_groups": 2})
    model = ladder(base, sizes=(32, 96)).sized(96).model
    assert (model.num_attention_heads, model.head_dim, model.num_query_groups) == (12, 8, 6)
    assert model.ffn_hidden_size == 264


def test_a_batch_below_the_micro_batch_still_splits() -> None:
    base = base_run(**{"training.micro_batch_size": 8})
    training = ladder(base, axis="batch", sizes=(4, 8, 12)).sized(12).training
    assert (training.global_batch_size, training.micro_batch_size) == (12, 4)


def test_the_base_of_the_run_stays_the_base() -> None:
    """A run that is itself a target keeps the base its hyperparameters were tuned at."""
    base = base_run(
        base={
            "hidden_size": 16,
            "ffn_hidden_size": 44,
            "num_attention_heads": 2,
            "head_dim": 8,
            "num_layers": 2,
            "batch_tokens": 128,
            "train_tokens": 12800,
        }
    )
    study = ladder(base)
    assert study.sized(64).ratios == Ratios(m_N=4)
    # No size of this ladder is at the base: the smallest is what others are compared with.
    assert study.reference == 32


def test_the_reference_is_the_size_of_the_base_and_not_the_smallest() -> None:
    assert ladder(axis="batch", sizes=(2, 8, 32)).reference == 8


def test_points_differ_in_what_they_are_named_for_alone() -> None:
    study = ladder(seeds=(3,), axis="depth", sizes=(2, 4))
    first, second = study.points("completedp", 4, (0.0, 1.0))
    assert second.config.hyperparams.lr == 2 * first.config.hyperparams.lr
    assert first.config.seed == 3
    assert first.config.model == second.config.model
    assert first.config.run_dir == f"runs/study/{first.id}"
    # One evaluation, at the end; no checkpoints that nobody asks for.
    assert first.config.evaluation.interval == first.config.steps == 100
    assert not first.config.checkpoint.save_at_end


def test_weight_decay_can_be_swept() -> None:
    study = ladder(swept="weight_decay")
    (point,) = ladder(swept="weight_decay", seeds=(1,)).points("completedp", 32, (1.0,))
    assert point.config.hyperparams.weight_decay == 0.2
    assert point.config.hyperparams.lr == study.base.hyperparams.lr


def test_runs_with_the_same_numbers_are_trained_once() -> None:
    """In width, mup is completedp; at the base every parametrization is the same run."""

    def ids(parametrization: Any, size: int) -> list[str]:
        return [point.id for point in study.points(parametrization, size, (0.0,))]

    study = ladder(parametrizations=("sp", "mup", "completep", "completedp"))
    assert ids("mup", 64) == ids("completedp", 64)
    assert len({tuple(ids(name, 32)) for name in study.settings.parametrizations}) == 1
    # The negative control: where the numbers differ, so do the runs.
    assert len({tuple(ids(name, 64)) for name in ("sp", "completep", "completedp")}) == 3
    # 5 values x 2 seeds: once at width 32, three times at width 64.
    assert len(study.missing([])) == 40


def test_missing_runs_come_seed_by_seed_and_the_longest_first() -> None:
    order = [
        (p.config.seed, p.labels["size"])
        for p in ladder(seeds=(7, 2), parametrizations=("completedp",)).missing([])
    ]
    assert order == [(7, 64)] * 5 + [(7, 32)] * 5 + [(2, 64)] * 5 + [(2, 32)] * 5


def test_a_finished_run_is_not_wanted_again() -> None:
    study = ladder()
    wanted = study.missing([])
    rows = rows_of(study, parabola({32: 0, 64: 0}))
    assert {row["id"] for row in rows} == {point.id for point in wanted}
    assert study.missing(rows) == []


def test_a_sweep_grows_towards_an_optimum_at_its_edge() -> None:
    study = ladder(parametrizations=("completedp",), max_added=2)
    rows = rows_of(study, parabola({32: 0, 64: -3.2}))
    assert study.sweep("completedp", 32, rows) == [-2, -1, 0, 1, 2]
    assert study.sweep("completedp", 64, rows) == [-4, -3, -2, -1, 0, 1, 2]


def test_a_sweep_grows_by_no_more_than_max_added() -> None:
    study = ladder(parametrizations=("completedp",), max_added=2)
    rows = rows_of(study, parabola({32: 0, 64: 50}))
    assert study.sweep("completedp", 64, rows) == [-2, -1, 0, 1, 2, 3, 4]
    assert study.missing(rows) == []


def test_a_study_wants_the_same_runs_when_it_is_taken_up_with_more_seeds() -> None:
    """Rows of fewer seeds stay good; a sweep waits for all seeds before it grows."""
    rows = rows_of(ladder(seeds=(1,)), parabola({32: 0, 64: 3.2}))
    study = ladder(seeds=(1, 2))
    assert {point.config.seed for point in study.missing(rows)} == {2}
    assert study.sweep("completedp", 64, rows) == [-2, -1, 0, 1, 2]


@pytest.mark.parametrize(
    ("losses", "added"),
    [
        ((2.1, 2, 2.1), None),
        ((1, 2, 3), -1.0),
        ((3, 2, 1), 3.0),
        ((math.inf, 2, 1), 3.0),
        ((2.1, 2, math.inf), 1.5),
        ((math.inf, 2, 2.1), 0.5),
        # A cliff that is no divergence: 1.5 nats higher.
        ((2.1, 2, 3.5), 1.5),
        ((3.5, 2, 2.1), 0.5),
        ((math.inf, math.inf, math.inf), -1.0),
    ],
)
def test_next_multiple(losses: tuple[float, ...], added: float | None) -> None:
    assert next_multiple(dict(zip((0.0, 1.0, 2.0), losses, strict=True))) == added


def test_the_search_for_a_cliff_ends() -> None:
    assert next_multiple({0.0: 2.05, 1.0: 2.0, 1.125: math.inf}) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sizes": (32,)}, "one size has nothing to drift from"),
        ({"sizes": ()}, "one size"),
        ({"sizes": (32, 32)}, "twice"),
        ({"sizes": (32, 0)}, "at least 1"),
        ({"sizes": (32, 60)}, "60, which model.head_dim = 8 does not divide"),
        ({"axis": "size"}, "'size'; expected one of width"),
        ({"swept": "eps"}, "'eps'; expected one of lr"),
        ({"parametrizations": ("ntk",)}, "'ntk'; expected one of sp"),
        ({"parametrizations": ("sp",)}, "judged has 'completedp'; expected one of sp"),
        ({"log2_multiples": (0, 1)}, "a parabola needs three"),
        ({"seeds": ()}, "nothing would be trained"),
        ({"seeds": (-1,)}, "seeds has -1; expected at least 0"),
        ({"ranks": 0}, "ranks has 0; expected at least 1"),
        ({"window": 0.0}, "window is 0.0"),
        ({"calibrate_duration": True, "run": "a.yaml"}, "axis width"),
        (
            {"calibrate_duration": True, "axis": "duration", "sizes": (12800, 25600)},
            "name the YAML",
        ),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ladder(**settings)


def test_a_width_without_whole_query_groups_is_refused() -> None:
    base = base_run(**{"model.num_query_groups": 2})
    with pytest.raises(ConfigError, match=r"num_query_groups = 2 into 2\.5"):
        ladder(base, sizes=(32, 40))


def test_a_hyperparameter_that_is_zero_cannot_be_swept() -> None:
    base = base_run(**{"hyperparams.weight_decay": 0.0})
    with pytest.raises(ConfigError, match="its multiples are too"):
        ladder(base, swept="weight_decay")


def test_rows_of_another_base_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    Results(file, ladder().identity)
    other = base_run(**{"schedule.warmup_fraction": 0.1})
    with pytest.raises(
        ConfigError, match=r"schedule\.warmup_fraction was \(not given\), is now 0\.1"
    ):
        Results(file, ladder(other).identity)
    with pytest.raises(ConfigError, match="swept was lr, is now weight_decay"):
        Results(file, ladder(swept="weight_decay").identity)


def test_more_seeds_sizes_and_values_are_the_same_study(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    Results(file, ladder().identity)
    more = {"seeds": (1, 2, 3), "sizes": (32, 64, 128), "log2_multiples": (-1.0, 0.0, 1.0)}
    Results(file, ladder(base_run(seed=5), workers=3, **more).identity)


def test_a_fitted_exponent_in_the_base_is_the_same_study_with_other_runs(tmp_path: Path) -> None:
    """The command that wrote it can be given again: its rows stay, its runs have other names."""
    file = tmp_path / "results.jsonl"
    before, after = ladder(), ladder(base_run(duration_exponent=0.4))
    Results(file, before.identity)
    Results(file, after.identity)
    study = {"axis": "duration", "sizes": (12800, 25600)}
    before, after = ladder(**study), ladder(base_run(duration_exponent=0.4), **study)
    (one,), (other,) = (each.points("completedp", 25600, [0.0])[:1] for each in (before, after))
    assert one.id != other.id


def test_what_is_carried_over_is_the_runs_own_size() -> None:
    """Also where the run itself is larger than the base that its values were tuned at."""
    base = {"hidden_size": 32, "ffn_hidden_size": 88, "num_attention_heads": 4, "head_dim": 8}
    base |= {"num_layers": 2, "batch_tokens": 128, "train_tokens": 6400}
    grown = base_run(base=base)
    assert grown.ratios.m_D == 2
    assert ladder(grown, axis="batch", sizes=(4, 8, 16)).reference == 8
    assert ladder(axis="width", sizes=(64, 128)).reference == 64


def test_a_run_with_two_names_or_of_other_seeds_counts_once_or_not() -> None:
    """At the base size every parametrization has the same numbers."""
    two = ladder(seeds=(1, 2), parametrizations=("completedp", "sp"), max_added=0)
    rows = rows_of(two, parabola({32: 0.0, 64: 0.0}))
    assert len(rows) == len(two.wanted(rows)) == 2 * 5 * (1 + 2)
    assert len(ladder(seeds=(1,), max_added=0).wanted(rows)) == 5 * (1 + 2)


def test_defaults_are_a_valid_study() -> None:
    assert TransferSettings().judged in TransferSettings().parametrizations
