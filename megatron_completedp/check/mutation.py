"""Which check sees a wrong exponent? Every cell of the table is changed by 1/2, up and down.

A check that passes a wrong table proves nothing by passing the right one. Cells that no check can
see at this size are named, with the reason.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from megatron_completedp.check import coordinate, eps, gradient, sde
from megatron_completedp.check.measure import Bench, Ladder, slopes
from megatron_completedp.check.settings import command_line
from megatron_completedp.check.sizes import small_base
from megatron_completedp.core.monomial import M_B, M_D, M_L, M_N, Monomial
from megatron_completedp.core.render import markdown_table
from megatron_completedp.core.roles import BIAS_ROLES, Role
from megatron_completedp.core.tables import Rules, build_table
from megatron_completedp.core.tables import Table as Rulebook
from megatron_completedp.errors import ConfigError
from megatron_completedp.study.code import sources_hash
from megatron_completedp.study.report import Finding, Report, Table
from megatron_completedp.study.results import Results
from megatron_completedp.study.sizes import Axis

Symbol = Literal["m_N", "m_L", "m_B", "m_D"]
AXES: dict[Symbol, Axis] = {"m_N": "width", "m_L": "depth", "m_B": "batch", "m_D": "duration"}
_FACTORS = {"m_N": M_N, "m_L": M_L, "m_B": M_B, "m_D": M_D}

#: The factors that belong to no role, under the name `global`.
GLOBAL = "global"
_GLOBAL_COLUMNS = ("residual_multiplier", "logit_multiplier", "one_minus_beta")
_ROW_COLUMNS = ("init_variance", "lr", "eps", "weight_decay")

#: Roles of the table that a model without biases has.
_ROLES = tuple(role for role in Role if role not in BIAS_ROLES)

#: What is added to an exponent.
CHANGES = (Fraction(1, 2), Fraction(-1, 2))

#: The base and one size are enough to see a slope change by 1/4 or more.
RATIOS = (1.0, 4.0)

#: Steps of the ladders: the coordinate check's, cut short, which the gradient check can share.
STEPS = (0, 2, 5, 6)

#: Cells that no check can see at this size, and why.
UNSEEN: dict[str, str] = {
    "qk_norm_gain eps m_N": "gradients of QK gains fall with up to N^-1/2 at this size, so that "
    "m_N^-1/2 fits them as well as the table's 1, which is for the coherent sum",
}


@dataclass(frozen=True)
class Cell:
    """One exponent of the table."""

    row: str
    """A role, or `global`."""
    column: str
    symbol: Symbol

    def __str__(self) -> str:
        return f"{self.row} {self.column} {self.symbol}"


@dataclass(frozen=True, kw_only=True)
class MutationSettings:
    """What the mutation test changes."""

    rows: tuple[str, ...] = (*(role.value for role in _ROLES), GLOBAL)
    """Rows of the table to change, and `global` for the factors outside of them."""
    symbols: tuple[str, ...] = ("m_N", "m_L", "m_B", "m_D")
    """Ratios whose exponents are changed."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the measurements; a finding that scatter fails for the right table is left out."""


def run(settings: MutationSettings, out: Path) -> Report:
    """Change every cell that `settings` name and list the checks that see it.

    Writes mutation.md, the table for the README, into `out`.
    """
    _check_names("rows", settings.rows, (*(role.value for role in _ROLES), GLOBAL))
    _check_names("symbols", settings.symbols, AXES)
    meaning = {"ratios": RATIOS, "steps": STEPS, "seeds": settings.seeds, "code": sources_hash()}
    results = Results(out / "results.jsonl", meaning)
    caught: dict[str, dict[str, list[str]]] = {row["cell"]: row["by"] for row in results.rows()}
    chosen = [
        cell
        for cell in cells(build_table(Rules()))
        if cell.row in settings.rows and cell.symbol in settings.symbols
    ]
    with Examiner(settings.seeds) as examiner:
        for cell in chosen:
            if str(cell) not in caught:
                by = {f"{float(change):+g}": examiner.caught(cell, change) for change in CHANGES}
                caught[str(cell)] = by
                results.append({"cell": str(cell), "by": by})
    (out / "mutation.md").write_text(markdown(chosen, caught) + "\n", encoding="utf-8")
    return Report(
        title="Mutation test",
        question="Is every exponent of the table held by a check?",
        command=command_line(),
        findings=tuple(_finding(cell, caught[str(cell)]) for cell in chosen),
        tables=(_table(chosen, caught),),
        settings={
            "changes": "+1/2 and -1/2 on each exponent",
            "ratio": f"{RATIOS[1]:g} along the axis of the symbol",
            "seeds": ", ".join(map(str, settings.seeds)),
        },
        exceptions=(
            "Biases have rows in the table, but this model has none: no check measures them.",
            *(f"{cell}: {reason}" for cell, reason in UNSEEN.items()),
        ),
    )


class Examiner:
    """Runs the checks' measurements on changed tables. A context manager, like its benches."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self._seeds = tuple(seeds)
        self._rules = Rules()
        self._stack = ExitStack()
        self._right: dict[Axis, set[tuple[str, str]]] = {}

    def __enter__(self) -> Examiner:
        base = small_base()
        near = eps.eps_at_gradient(base)
        # One layout for both: entering the second would set up Megatron's groups again.
        self._bench = self._stack.enter_context(Bench(base, None, steps=STEPS))
        self._eps_bench = self._bench.beside(near, steps=eps.STEPS, optimizer=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def caught(self, cell: Cell, change: Fraction) -> list[str]:
        """The checks with findings that fail with the changed cell and pass with the right one."""
        axis = AXES[cell.symbol]
        if axis not in self._right:
            self._right[axis] = set(self._failures(axis, None))
        wrong = set(self._failures(axis, mutated(build_table(self._rules), cell, change)))
        return sorted({check for check, _ in wrong - self._right[axis]})

    def _failures(self, axis: Axis, table: Rulebook | None) -> Iterator[tuple[str, str]]:
        """(check, finding) of all findings along `axis` that fail."""
        ladder = Ladder(axis=axis, ratios=RATIOS, seeds=self._seeds)
        found, _ = slopes(self._bench, ladder, table=table)
        groups: dict[str, list[Finding]] = {
            "coordinate": list(coordinate.examine(ladder, found, STEPS))
        }
        if axis in ("width", "depth"):
            groups["gradient"] = list(gradient.examine(ladder, found, STEPS))
        else:
            groups["sde"] = list(sde.examine(self._rules, table))
        found, _ = slopes(self._eps_bench, ladder, table=table)
        groups["eps"] = list(eps.examine(ladder, found, self._rules.depth_weight_decay))
        for check, findings in groups.items():
            yield from ((check, finding.what) for finding in findings if not finding.passed)


def _check_names(setting: str, names: Sequence[str], known: Collection[str]) -> None:
    """Raise ConfigError for a row or a symbol that the table does not have."""
    for name in names:
        if name not in known:
            raise ConfigError(f"{setting} has {name!r}; expected some of {', '.join(known)}.")


def cells(table: Rulebook) -> Iterator[Cell]:
    """Every exponent of `table` that a model without biases uses, the zeros included."""
    for symbol in AXES:
        for role, row in table.rows.items():
            for column in _ROW_COLUMNS:
                if role not in BIAS_ROLES and getattr(row, column) is not None:
                    yield Cell(role.value, column, symbol)
        for column in _GLOBAL_COLUMNS:
            yield Cell(GLOBAL, column, symbol)


def mutated(table: Rulebook, cell: Cell, change: Fraction) -> Rulebook:
    """`table` with `change` added to one exponent."""
    factor: Monomial = _FACTORS[cell.symbol] ** change
    if cell.row == GLOBAL:
        return replace(table, **{cell.column: getattr(table, cell.column) * factor})
    role = Role(cell.row)
    row = table.rows[role]
    row = replace(row, **{cell.column: getattr(row, cell.column) * factor})
    return replace(table, rows=MappingProxyType({**table.rows, role: row}))


def markdown(chosen: Sequence[Cell], caught: Mapping[str, Mapping[str, Sequence[str]]]) -> str:
    """The table for the README: a line per row and column, a column per symbol."""
    header, rows = _layout(chosen, caught)
    return markdown_table(header, rows)


def _table(chosen: Sequence[Cell], caught: Mapping[str, Mapping[str, Sequence[str]]]) -> Table:
    header, rows = _layout(chosen, caught)
    return Table(
        title="Checks that see an exponent changed by +1/2 or -1/2",
        header=tuple(header),
        rows=tuple(tuple(row) for row in rows),
        note="`+: eps; -: none` where the two changes differ.",
    )


def _layout(
    chosen: Sequence[Cell], caught: Mapping[str, Mapping[str, Sequence[str]]]
) -> tuple[list[str], list[list[str]]]:
    symbols = list(dict.fromkeys(cell.symbol for cell in chosen))
    lines = list(dict.fromkeys((cell.row, cell.column) for cell in chosen))
    rows = [
        [f"{row} {column}", *(_text(caught[str(Cell(row, column, symbol))]) for symbol in symbols)]
        for row, column in lines
    ]
    return ["cell", *symbols], rows


def _text(by: Mapping[str, Sequence[str]]) -> str:
    up, down = (", ".join(checks) or "none" for checks in by.values())
    return up if up == down else f"+: {up}; -: {down}"


def _finding(cell: Cell, by: Mapping[str, Sequence[str]]) -> Finding:
    unseen = UNSEEN.get(str(cell))
    return Finding(
        what=f"{cell}: changes of 1/2 that some check sees, of 2",
        value=sum(bool(checks) for checks in by.values()),
        low=1 if unseen else 2,
        # One that is seen after all is no longer to be told as unseen.
        high=1 if unseen else 2,
        note=unseen or _text(by),
    )
