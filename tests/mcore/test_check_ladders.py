"""The right table passes the checks of slopes; each kind of wrong one fails where it should."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from megatron_completedp.check import coordinate, eps, expected, gradient
from megatron_completedp.check.measure import Bench, Key, Ladder, Series, slopes, summarize
from megatron_completedp.check.mutation import Cell, mutated
from megatron_completedp.check.probe import Record
from megatron_completedp.check.sizes import small_base
from megatron_completedp.config.parallel import ParallelConfig
from megatron_completedp.config.run import RunConfig
from megatron_completedp.core.monomial import ALPHA, M_L, Monomial
from megatron_completedp.core.multipliers import ModuleMultipliers
from megatron_completedp.core.ratios import Scale
from megatron_completedp.core.roles import Module
from megatron_completedp.core.tables import Rules, Table, build_table
from megatron_completedp.errors import ConfigError
from megatron_completedp.mcore.parallel import destroy_parallel, initialize_parallel
from megatron_completedp.mcore.platform import Platform
from megatron_completedp.plan.run_plan import Plan
from megatron_completedp.study.report import Finding

from .train_runs import make_corpus, write_run

WIDTH = Ladder(axis="width", ratios=(1, 4), seeds=(0, 1))
DEPTH = Ladder(axis="depth", ratios=(1, 4), seeds=(0, 1))

#: Enough for a slope after step 1 and for a gradient.
STEPS = (0, 2, 5)


@pytest.fixture(scope="module", autouse=True)
def own_groups(platform: Platform) -> Iterator[None]:
    """A bench sets up Megatron's groups itself, as the command does."""
    destroy_parallel(keep_process_group=True)
    yield
    initialize_parallel(platform, ParallelConfig(), timeout_s=60, seed=1234)


@pytest.fixture(scope="module")
def bench(own_groups: None) -> Iterator[Bench]:
    with Bench(small_base(), None, steps=STEPS) as opened:
        yield opened


@pytest.fixture(scope="module")
def eps_bench(bench: Bench) -> Bench:
    destroy_parallel(keep_process_group=True)
    near = eps.eps_at_gradient(small_base())
    initialize_parallel(bench._processes.platform, ParallelConfig(), timeout_s=60, seed=1)
    return bench.beside(near, steps=eps.STEPS, optimizer=True)


def wrong(row: str, column: str, symbol: str, change: Fraction | int) -> Table:
    return mutated(build_table(Rules()), Cell(row, column, symbol), Fraction(change))


def failures(findings: Iterator[Finding]) -> set[str]:
    """`quantity of place` of the findings that fail."""
    found = [finding.what for finding in findings if not finding.passed]
    return {what.split("slope of ")[1].rsplit(",", 1)[0] for what in found}


def coordinate_failures(bench: Bench, ladder: Ladder, table: Table | None = None) -> set[str]:
    return failures(coordinate.examine(ladder, slopes(bench, ladder, table=table)[0], STEPS))


def gradient_failures(bench: Bench, ladder: Ladder, table: Table | None = None) -> set[str]:
    return failures(gradient.examine(ladder, slopes(bench, ladder, table=table)[0], STEPS))


def eps_failures(bench: Bench, ladder: Ladder, table: Table | None = None) -> set[str]:
    return failures(eps.examine(ladder, slopes(bench, ladder, table=table)[0], "paper"))


@pytest.mark.parametrize("ladder", [WIDTH, DEPTH], ids=["width", "depth"])
def test_the_right_table_passes(bench: Bench, eps_bench: Bench, ladder: Ladder) -> None:
    assert coordinate_failures(bench, ladder) == set()
    assert gradient_failures(bench, ladder) == set()
    assert eps_failures(eps_bench, ladder) == set()


def test_sp_fails_the_coordinate_check(bench: Bench) -> None:
    failed = coordinate_failures(bench, WIDTH, build_table(Rules(parametrization="sp")))
    # Every matrix moves its output by N times as much, and the first logits do not shrink.
    assert {f"contribution of {name}" for name in ("q", "k", "v", "gate", "up")} <= failed
    assert {"activation of q", "activation of logits"} <= failed


def test_a_residual_multiplier_left_out_fails_in_depth(bench: Bench) -> None:
    table = wrong("global", "residual_multiplier", "m_L", 1)
    failed = coordinate_failures(bench, DEPTH, table)
    assert {"activation of mlp_branch, middle", "change of residual, last"} <= failed
    assert "gradient of down, middle" in gradient_failures(bench, DEPTH, table)


def test_dropping_the_embeddings_eps_rule_fails_at_four_times_the_width(eps_bench: Bench) -> None:
    failed = eps_failures(eps_bench, WIDTH, wrong("embedding", "eps", "m_N", 1))
    assert failed == {"update of embedding", "memory of embedding"}


@pytest.mark.parametrize(
    ("cell", "names"),
    [
        (("hidden_weight", "weight_decay", "m_N"), ("q", "k", "v", "gate", "up")),
        (("final_norm_gain", "weight_decay", "m_N"), ("final_norm",)),
    ],
)
def test_decay_over_a_run_is_held_for_its_modules_alone(
    eps_bench: Bench, cell: tuple[str, str, str], names: tuple[str, ...]
) -> None:
    failed = eps_failures(eps_bench, WIDTH, wrong(*cell, Fraction(1, 2)))
    assert failed == {f"decay of {name}" for name in names}


@pytest.mark.parametrize(
    ("column", "factor", "names"),
    [
        ("eps", M_L ** (ALPHA - 1), {"update of q, middle", "update of down, middle"}),
        ("lr", M_L ** (1 - ALPHA), {"decay of q, middle", "decay of down, middle"}),
    ],
)
def test_a_wrong_alpha_is_seen_below_one(
    eps_bench: Bench, column: str, factor: Monomial, names: set[str]
) -> None:
    """At alpha 1, where most runs are, m_L^-alpha and m_L^-1 are one, and no check can tell."""
    table = build_table(Rules())
    rows = {
        role: replace(row, **{column: getattr(row, column) * factor})
        for role, row in table.rows.items()
    }
    wrong_alpha = replace(table, rows=rows)
    half = replace(DEPTH, alpha=0.5)
    assert eps_failures(eps_bench, half) == set()
    assert eps_failures(eps_bench, DEPTH, wrong_alpha) == set()
    assert names <= eps_failures(eps_bench, half, wrong_alpha)


def test_the_readouts_gradient_falls_where_a_multiplier_divides_the_logits() -> None:
    assert expected.gradient("unembedding", "width", 1).middle == 0
    assert expected.gradient("unembedding", "width", 1, "completep").middle == -1


def test_windows_that_depend_on_width_are_seen(eps_bench: Bench) -> None:
    failed = eps_failures(eps_bench, WIDTH, wrong("global", "one_minus_beta", "m_N", 1))
    assert {"memory of embedding", "memory of unembedding", "memory of q"} <= failed


@pytest.mark.parametrize("axis", ["batch", "duration"])
def test_where_training_starts_depends_on_neither_batch_nor_duration(
    bench: Bench, axis: str
) -> None:
    ladder = Ladder(axis=axis, ratios=(1, 4), seeds=(0,))
    symbol = {"batch": "m_B", "duration": "m_D"}[axis]
    assert coordinate_failures(bench, ladder) == set()
    table = wrong("embedding", "init_variance", symbol, Fraction(1, 2))
    assert "activation of embedding" in coordinate_failures(bench, ladder, table)


def test_an_engine_that_diverges_has_no_numbers() -> None:
    base = small_base()
    wild = replace(base, hyperparams=replace(base.hyperparams, lr=1e30))
    destroy_parallel(keep_process_group=True)
    with Bench(wild, None, steps=(0, 2, 5)) as bench:
        ladder = Ladder(axis="width", ratios=(1, 2), seeds=(0,))
        assert bench.series(ladder, 2, 0) == {}


def test_a_diverged_engine_fails_by_its_name_and_is_never_averaged(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = Key("activation", "q", "layers", 0)
    well = {(64, 100): {key: 1.0}}

    def measured(config: RunConfig, *_: object) -> Series:
        return well.get((config.model.hidden_size, config.seed), {})

    monkeypatch.setattr(bench, "_measure", measured)
    monkeypatch.setattr(bench, "_known", {})
    ladder = Ladder(axis="width", ratios=(1, 2), seeds=(100, 101))
    found, _ = slopes(bench, ladder)
    assert math.isnan(found[key])
    failed = list(coordinate.divergence(bench, ladder))
    assert not any(finding.passed for finding in failed)
    assert [finding.what for finding in failed] == [
        "width x 1 (alpha 1), seed 101: diverged",
        "width x 2 (alpha 1), seed 100: diverged",
        "width x 2 (alpha 1), seed 101: diverged",
    ]


def test_what_was_measured_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ladder = Ladder(axis="width", ratios=(1, 2), seeds=(0,))
    destroy_parallel(keep_process_group=True)
    with Bench(small_base(), tmp_path, steps=(0, 1)) as bench:
        first, _ = slopes(bench, ladder)
    monkeypatch.delattr("megatron_completedp.check.measure.probe")
    with Bench(small_base(), tmp_path, steps=(0, 1)) as bench:
        # As flags give them: the same numbers, of another type.
        second, _ = slopes(bench, replace(ladder, ratios=(1.0, 2.0)))
    assert second == first
    # Rows of other rules are no measurements of these.
    other = wrong("embedding", "lr", "m_N", 1)
    monkeypatch.setattr("megatron_completedp.core.resolve.build_table", lambda rules: other)
    with Bench(small_base(), tmp_path, steps=(0, 1)) as bench:
        assert bench.series(ladder, 1, 0), "at the base all tables are one"
        with pytest.raises(NameError, match="probe"):
            bench.series(ladder, 2, 0)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="results of another config"):
        Bench(small_base(), tmp_path, steps=(0, 2)).__enter__()
    destroy_parallel(keep_process_group=True)


def test_eps_is_the_same_whatever_seeds_are_measured(tmp_path: Path) -> None:
    """So that seeds can be added to what was measured."""
    destroy_parallel(keep_process_group=True)
    settings = eps.EpsSettings(widths=(1, 2), depths=(1, 2), alphas=(1,), seeds=(0,))
    eps.run(settings, tmp_path)
    rows = len((tmp_path / "results.jsonl").read_text().splitlines())
    eps.run(replace(settings, seeds=(0, 1)), tmp_path)
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) > rows
    destroy_parallel(keep_process_group=True)


def test_eps_meets_the_gradient_of_a_base_away_from_where_its_values_were_tuned(
    own_groups: None,
) -> None:
    """There the rules scale eps already: what they do must not be done twice."""
    small = small_base()
    tuned_at = Scale(
        hidden_size=16,
        ffn_hidden_size=32,
        num_attention_heads=1,
        head_dim=16,
        num_layers=1,
        batch_tokens=small.batch_tokens,
        train_tokens=small.train_tokens,
    )
    gate = ModuleMultipliers(lr_mult=2.0, eps_mult=3.0)
    base = replace(
        small,
        base=tuned_at,
        multipliers=replace(small.multipliers, types={Module.GATE: gate}),
    )
    destroy_parallel(keep_process_group=True)
    near = eps.eps_at_gradient(base)
    with Bench(base, None, steps=eps.STEPS) as opened:
        width = Ladder(axis="width", ratios=(1,), seeds=(base.seed,))
        measured = opened.series(width, 1, base.seed)
    destroy_parallel(keep_process_group=True)
    for entry in Plan.of(near).resolved.modules:
        where = "" if entry.layer is None else "layers"
        gradient_rms = 2 ** measured[Key("gradient", entry.module.value, where, 0)]
        assert entry.eps == pytest.approx(gradient_rms, rel=0.06), entry.module
    assert near.multipliers.of(Module.GATE).lr_mult == 2


def test_a_ladder_of_one_size_is_refused(bench: Bench) -> None:
    with pytest.raises(ConfigError, match=r"ratios \(2, 2\); expected two or more"):
        slopes(bench, Ladder(axis="width", ratios=(2, 2), seeds=(0,)))


def test_a_depth_without_a_middle_is_refused(bench: Bench) -> None:
    with pytest.raises(ConfigError, match=r"depth x 1\.5 has 3 layers; expected an even number"):
        slopes(bench, Ladder(axis="depth", ratios=(1, 1.5), seeds=(0,)))


def test_a_run_file_is_the_base_with_its_own_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", make_corpus(tmp_path / "corpus"), depth_alpha=0.5)
    settings = coordinate.CoordinateSettings(
        run=str(run), widths=(1, 2), depths=(1, 2), alphas=(1,), seeds=(0,)
    )
    destroy_parallel(keep_process_group=True)
    report = coordinate.run(settings, tmp_path / "out")
    assert report.settings["data"] == "training text of the run"
    assert report.settings["base"].startswith("width 64, 2 layers, head_dim 32, vocabulary 512")
    # Whether this base passes is its user's business; that everything was measured is ours.
    assert not any(math.isnan(finding.value) for finding in report.findings)
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").open()][1:]
    wide = {row["alpha"] for row in rows if (row["axis"], row["ratio"]) == ("width", 2)}
    assert wide == {0.5}, "the run's, where a ladder of depths is not asked for another"


def test_depth_is_compared_at_equal_parts_of_it() -> None:
    """With layers that grow in proportion to depth, the middle of 2 and of 8 layers agree."""

    def middle(num_layers: int, name: str, halves: float) -> float:
        records = [
            Record("change", name, layer, 1, (layer + halves) / num_layers)
            for layer in range(num_layers)
        ]
        return summarize(records, "depth", num_layers)[Key("change", name, "middle", 1)]

    for name, halves in (("q", 0.0), ("gate", 0.5), ("residual", 1.0)):
        assert middle(2, name, halves) == pytest.approx(math.log2(0.5)), name
        assert middle(8, name, halves) == pytest.approx(math.log2(0.5)), name
