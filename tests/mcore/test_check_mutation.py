"""Every exponent is changed once each way, and the README's table says which check sees it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from megatron_completedp.check.mutation import (
    UNSEEN,
    Cell,
    Examiner,
    MutationSettings,
    cells,
    mutated,
    run,
)
from megatron_completedp.config.parallel import ParallelConfig
from megatron_completedp.core.ratios import Ratios
from megatron_completedp.core.roles import BIAS_ROLES, GAIN_ROLES, Role
from megatron_completedp.core.tables import Rules, Table, build_table
from megatron_completedp.errors import ConfigError
from megatron_completedp.mcore.parallel import destroy_parallel, initialize_parallel
from megatron_completedp.mcore.platform import Platform

README = Path(__file__).parents[2] / "README.md"

HALF = Fraction(1, 2)

#: One cell of each kind, cheap ones where there is a choice.
SAMPLED = (
    Cell("embedding", "eps", "m_N"),
    Cell("qk_norm_gain", "eps", "m_N"),
    Cell("hidden_weight", "lr", "m_L"),
    Cell("global", "residual_multiplier", "m_L"),
    Cell("global", "one_minus_beta", "m_B"),
)


@pytest.fixture(scope="module")
def examiner(platform: Platform) -> Iterator[Examiner]:
    destroy_parallel(keep_process_group=True)
    with Examiner(MutationSettings().seeds) as opened:
        yield opened
    initialize_parallel(platform, ParallelConfig(), timeout_s=60, seed=1234)


def readme_text() -> str:
    """The table between the README's markers."""
    text = README.read_text(encoding="utf-8")
    found = text.split("<!-- mutation table -->")[1].split("<!-- end of mutation table -->")[0]
    return found.strip()


def readme_table() -> dict[Cell, str]:
    """The text of each cell of the table between the README's markers."""
    table = readme_text()
    lines = [[c.strip() for c in line.strip("| ").split("|")] for line in table.split("\n") if line]
    (_, *symbols), _, *rows = lines
    return {
        Cell(*name.split(), symbol): text
        for name, *texts in rows
        for symbol, text in zip(symbols, texts, strict=True)
    }


def test_the_readme_has_every_cell() -> None:
    assert set(readme_table()) == set(cells(build_table(Rules())))


def test_the_readme_admits_the_cells_that_nothing_sees() -> None:
    unseen = {str(cell) for cell, text in readme_table().items() if "none" in text}
    assert unseen == set(UNSEEN)


@pytest.mark.parametrize("cell", SAMPLED, ids=str)
def test_the_readme_says_which_check_sees_a_change(examiner: Examiner, cell: Cell) -> None:
    up, down = (", ".join(examiner.caught(cell, change)) or "none" for change in (HALF, -HALF))
    assert readme_table()[cell] == (up if up == down else f"+: {up}; -: {down}")


@pytest.mark.slow
def test_every_cell_is_seen_or_named(tmp_path: Path) -> None:
    """The whole test: half an hour on one core."""
    destroy_parallel(keep_process_group=True)
    report = run(MutationSettings(), tmp_path)
    assert report.passed, [finding.what for finding in report.findings if not finding.passed]
    assert (tmp_path / "mutation.md").read_text(encoding="utf-8").strip() == readme_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": ("embeding",)}, "rows has 'embeding'; expected some of embedding, "),
        ({"symbols": ("m_S",)}, "symbols has 'm_S'; expected some of m_N, "),
    ],
)
def test_a_name_that_the_table_does_not_have_is_refused(
    settings: dict[str, tuple[str, ...]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(MutationSettings(**settings), tmp_path)


def test_verdicts_of_other_seeds_or_of_other_code_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Examiner, "__enter__", lambda self: self)
    monkeypatch.setattr(Examiner, "caught", lambda *_: ["eps"])
    settings = MutationSettings(rows=("embedding",), symbols=("m_N",))
    assert run(settings, tmp_path).passed
    with pytest.raises(ConfigError, match="seeds was"):
        run(replace(settings, seeds=(3,)), tmp_path)
    monkeypatch.setattr("megatron_completedp.check.mutation.sources_hash", lambda: "edited")
    with pytest.raises(ConfigError, match="code was"):
        run(settings, tmp_path)


def test_cells_are_those_of_a_model_without_biases() -> None:
    found = list(cells(build_table(Rules())))
    weights = len(Role) - len(GAIN_ROLES) - len(BIAS_ROLES)
    rows = Counter(cell.row for cell in found)
    assert len(found) == len(set(found))
    assert rows["embedding"] == 4 * 4
    assert rows["pre_norm_gain"] == 3 * 4  # gains start at 1: no init
    assert rows["global"] == 3 * 4
    assert len(found) == 4 * (4 * weights + 3 * len(GAIN_ROLES) + 3)


def test_a_change_touches_one_exponent() -> None:
    def values(table: Table) -> dict[tuple[str, str], float]:
        ratios = Ratios(m_N=4, m_L=9, m_B=16, m_D=25)
        cells = {
            (role, column): getattr(row, column)
            for role, row in table.rows.items()
            for column in ("init_variance", "lr", "eps", "weight_decay")
        }
        return {key: cell.at(ratios) for key, cell in cells.items() if cell is not None}

    right = values(build_table(Rules()))
    wrong = values(mutated(build_table(Rules()), Cell("embedding", "eps", "m_L"), HALF))
    changed = {key: wrong[key] / right[key] for key in right if wrong[key] != right[key]}
    assert changed == {("embedding", "eps"): pytest.approx(3)}
