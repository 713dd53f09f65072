"""What a study found: findings against their bounds, figures, tables, and what it does not show.

A study returns a `Report` and draws nothing itself; `page.write_report` makes the files of it.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_completedp.core.render import text_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One measured number and the bounds it was held to."""

    what: str
    """What was measured, e.g. `slope of the change of q in width, step 10`."""
    value: float
    """The measurement; NaN, which fails, where there is none."""
    low: float
    """Smallest value that passes; -inf for none."""
    high: float
    """Largest value that passes; inf for none."""
    note: str = ""
    """Why this bound, or what to look at when it fails."""
    strict: bool = False
    """Whether `low` itself fails, too."""

    @property
    def passed(self) -> bool:
        """Whether the value lies within the bounds; NaN lies nowhere."""
        return self.low <= self.value <= self.high and not (self.strict and self.value == self.low)

    @property
    def held(self) -> bool:
        """Whether there is a bound at all; without one it is there for comparison."""
        return math.isfinite(self.low) or math.isfinite(self.high)

    @property
    def bounds(self) -> str:
        """The bounds in words."""
        if not self.held:
            return "any number"
        if math.isinf(self.low):
            return f"at most {self.high:.4g}"
        if math.isinf(self.high):
            return f"{'above' if self.strict else 'at least'} {self.low:.4g}"
        return f"{self.low:.4g} to {self.high:.4g}"


@dataclass(frozen=True, kw_only=True)
class FigureSpec:
    """A figure by name; `draw` gets an empty matplotlib figure in the style of `plot`."""

    name: str
    """File name without its ending: NAME.png and NAME.svg."""
    caption: str
    """What is drawn and how to read it, for someone who has not read the code."""
    draw: Callable[[Figure], None]
    """Fills the figure."""
    size: tuple[float, float] = (5.0, 3.6)
    """Width and height in inches. Wider than 6 fills the page and scrolls on a phone."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Numbers behind the findings, already formatted. First column left, the others right."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    """How to read it."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything one study has to say."""

    title: str
    question: str
    """The question that the verdict answers, ending in a question mark."""
    command: str
    """The command line that made it."""
    findings: tuple[Finding, ...]
    figures: tuple[FigureSpec, ...] = ()
    tables: tuple[Table, ...] = ()
    settings: Mapping[str, str]
    """What it was run with, formatted."""
    exceptions: tuple[str, ...] = ()
    """Documented exceptions, doubts, and what the study does not show."""
    afterwards: Callable[[], str] | None = None
    """What is left to do when the report's files are there; returns what was done."""

    def __post_init__(self) -> None:
        names = [figure.name for figure in self.figures]
        assert len(set(names)) == len(names), f"figures of one name overwrite each other: {names}"

    @property
    def passed(self) -> bool:
        """Whether every finding passed. A check that held nothing has shown nothing: it fails."""
        return bool(self._held) and all(finding.passed for finding in self.findings)

    @property
    def verdict(self) -> str:
        """The verdict in a line."""
        count = len(self._held)
        failed = sum(not finding.passed for finding in self.findings)
        if self.passed:
            return f"PASSED: {count} of {count} findings within their bounds"
        if not count:
            return "FAILED: nothing was measured"
        return f"FAILED: {failed} of {count} findings outside their bounds"

    @property
    def _held(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.held]


def report_json(report: Report) -> dict[str, Any]:
    """The report as plain data, for scripts; null stands for a missing value or bound."""
    return {
        "title": report.title,
        "passed": report.passed,
        "verdict": report.verdict,
        "question": report.question,
        "command": report.command,
        "findings": [
            {
                "what": finding.what,
                "passed": finding.passed,
                "value": _finite(finding.value),
                "low": _finite(finding.low),
                "high": _finite(finding.high),
                "note": finding.note,
            }
            for finding in report.findings
        ],
        "tables": [
            {
                "title": table.title,
                "header": list(table.header),
                "rows": [list(row) for row in table.rows],
                "note": table.note,
            }
            for table in report.tables
        ],
        "settings": dict(report.settings),
        "exceptions": list(report.exceptions),
    }


def print_report(report: Report) -> str:
    """The terminal's text: the verdict, then every finding with those that failed first."""
    ordered = sorted(report.findings, key=lambda finding: finding.passed)
    rows = [
        ["ok" if item.passed else "FAIL", item.what, f"{item.value:.4g}", item.bounds]
        for item in ordered
    ]
    header, *table = text_table(["", "finding", "value", "expected"], rows, left=2).splitlines()
    lines = [report.title, report.verdict, report.question, "", header]
    for line, item in zip(table, ordered, strict=True):
        lines.append(line)
        # Below its finding: notes are sentences, and a column of them would be wider than a screen.
        lines += textwrap.wrap(item.note, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    if report.exceptions:
        lines += ["", "exceptions and limits"]
        lines += [f"- {text}" for text in report.exceptions]
    return "\n".join(lines)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
