"""The files of a report: figures, report.json, and one HTML page that needs nothing beside it.

The page has no scripts and fetches nothing: figures are embedded, so it can be mailed.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path

from megatron_completedp.data.atomic import atomic_write
from megatron_completedp.study.plot import render
from megatron_completedp.study.report import FigureSpec, Finding, Report, Table, report_json

#: Figures wider than this, in inches, take the page's whole width.
_WIDE = 6.0
#: CSS pixels per inch.
_PIXELS = 96


@dataclass(frozen=True, kw_only=True)
class IndexEntry:
    """One line of the page that links reports."""

    name: str
    verdict: str
    passed: bool | None
    """None where the check has not run yet."""
    href: str | None
    """Where the report lies, relative to the index; None where a check made none."""


def write_report(folder: Path, report: Report) -> None:
    """Write report.html, report.json and NAME.png and NAME.svg of each figure into `folder`.

    Every file is either the old one or whole; report.html comes last.
    """
    drawings = []
    for spec in report.figures:
        files = render(spec)
        for kind, content in files.items():
            _write(folder / f"{spec.name}.{kind}", content)
        drawings.append(_figure(spec, files["svg"]))
    _write(folder / "report.json", (json.dumps(report_json(report), indent=1) + "\n").encode())
    _write(folder / "report.html", _report_page(report, drawings).encode())


def write_index(folder: Path, title: str, entries: Sequence[IndexEntry]) -> None:
    """Write index.html, which links the reports with their verdicts."""
    failed = sum(entry.passed is False for entry in entries)
    pending = sum(entry.passed is None for entry in entries)
    if failed:
        verdict, passed = f"FAILED: {failed} of {len(entries)} checks", False
    elif pending:
        verdict, passed = f"UNFINISHED: {pending} of {len(entries)} checks have not run", None
    else:
        verdict, passed = "PASSED: every check", True
    rows = [
        f"<tr><td>{_mark(entry.passed)}</td><td>{_link(entry)}</td>"
        f"<td>{escape(entry.verdict)}</td></tr>"
        for entry in entries
    ]
    body = [
        f"<h1>{escape(title)}</h1>",
        _banner(verdict, passed=passed),
        _table_box(["", "check", "verdict"], rows),
    ]
    _write(folder / "index.html", _page(title, body).encode())


def _report_page(report: Report, drawings: Sequence[str]) -> str:
    body = [
        f"<h1>{escape(report.title)}</h1>",
        _banner(report.verdict, passed=report.passed),
        f"<p class=question>{escape(report.question)}</p>",
        f"<pre>{escape(report.command)}</pre>",
    ]
    if report.findings:
        body += ["<h2>Findings</h2>", _findings(report.findings)]
    if drawings:
        body += ["<h2>Figures</h2>", f"<div class=figures>{''.join(drawings)}</div>"]
    for table in report.tables:
        body += [f"<h2>{escape(table.title)}</h2>", _table(table)]
    settings = [
        f"<tr><th scope=row>{escape(name)}</th><td>{escape(value)}</td></tr>"
        for name, value in report.settings.items()
    ]
    body += ["<h2>Settings</h2>", _table_box([], settings)]
    if report.exceptions:
        items = "".join(f"<li>{escape(text)}</li>" for text in report.exceptions)
        body += ["<h2>Exceptions and limits</h2>", f"<ul>{items}</ul>"]
    return _page(report.title, body)


def _page(title: str, body: Iterable[str]) -> str:
    css = resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            '<head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            # An empty icon, or the browser would ask a server for one.
            '<link rel="icon" href="data:,">',
            f"<title>{escape(title)}</title>",
            f"<style>\n{css}</style></head>",
            "<body><main>",
            *body,
            "</main></body></html>\n",
        ]
    )


def _banner(verdict: str, *, passed: bool | None) -> str:
    kind = {True: " pass", False: " fail", None: ""}[passed]
    return f'<p class="verdict{kind}">{escape(verdict)}</p>'


def _mark(passed: bool | None) -> str:
    """The result of one row, told by its word before its colour."""
    if passed is None:
        return "-"
    return "<b class=pass>pass</b>" if passed else "<b class=fail>FAIL</b>"


def _link(entry: IndexEntry) -> str:
    name = escape(entry.name)
    return name if entry.href is None else f'<a href="{escape(entry.href)}">{name}</a>'


def _findings(findings: Sequence[Finding]) -> str:
    """Those that failed come first; the note stands under what was measured."""
    rows = []
    for item in sorted(findings, key=lambda finding: finding.passed):
        note = f"<small>{escape(item.note)}</small>" if item.note else ""
        rows.append(
            f"<tr><td>{_mark(item.passed)}</td><td>{escape(item.what)}{note}</td>"
            f"<td class=number>{item.value:.4g}</td>"
            f"<td class=number>{escape(item.bounds)}</td></tr>"
        )
    return _table_box(["", "finding", "value", "expected"], rows, numbers_from=2)


def _table(table: Table) -> str:
    rows = []
    for first, *others in table.rows:
        cells = "".join(f"<td class=number>{escape(cell)}</td>" for cell in others)
        rows.append(f"<tr><th scope=row>{escape(first)}</th>{cells}</tr>")
    note = f"<p>{escape(table.note)}</p>" if table.note else ""
    return note + _table_box(table.header, rows, numbers_from=1)


def _table_box(header: Sequence[str], rows: Iterable[str], numbers_from: int = 99) -> str:
    """A table that scrolls inside its own box where the page is too narrow for it."""
    cells = "".join(
        f"<th scope=col{' class=number' if column >= numbers_from else ''}>{escape(name)}</th>"
        for column, name in enumerate(header)
    )
    head = f"<thead><tr>{cells}</tr></thead>" if header else ""
    # Focusable, so that the keyboard can scroll it.
    return f"<div class=scroll tabindex=0><table>{head}<tbody>{''.join(rows)}</tbody></table></div>"


def _figure(spec: FigureSpec, svg: bytes) -> str:
    width, height = (round(inches * _PIXELS) for inches in spec.size)
    data = base64.b64encode(svg).decode()
    kind = " class=wide" if spec.size[0] > _WIDE else ""
    return (
        f'<figure{kind}><div class=scroll tabindex=0><img alt="{escape(spec.name)}" '
        f'width={width} height={height} src="data:image/svg+xml;base64,{data}"></div>'
        f"<figcaption>{escape(spec.caption)}</figcaption></figure>"
    )


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as stream:
        stream.write(content)
