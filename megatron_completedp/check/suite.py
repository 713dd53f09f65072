"""Every check in its default small setting, one after another, and a page that links them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from megatron_completedp.check.settings import PROG
from megatron_completedp.study.page import IndexEntry, write_index

#: From seconds to minutes, so that what fails early says so early.
SUITE = ("sde", "eps", "gradient", "coordinate", "transfer")

TITLE = "Checks of the transfer rules"

DESCRIPTION = """\
Run the default small suite (sde, eps, gradient, coordinate, transfer) and write index.html, which
links the reports with their verdicts. Exits with 1 when one of them failed.

Example:
  python -m megatron_completedp.check all --out runs/checks
"""


@dataclass(frozen=True, kw_only=True)
class SuiteFlags:
    """Flags of `all`."""

    out: Path = Path("runs/checks")
    """Folder for one folder per check and index.html."""


def run_suite(argv: Sequence[str]) -> int:
    """Run the suite that `argv` describes. Returns 0 when every check passed, else 1."""
    flags = tyro.cli(SuiteFlags, prog=f"{PROG} all", description=DESCRIPTION, args=list(argv))
    entries = {
        name: IndexEntry(name=name, verdict="not run yet", passed=None, href=None) for name in SUITE
    }
    for name in SUITE:
        # Before each check: an interrupted suite leaves the page of what it did, and did not.
        write_index(flags.out, TITLE, list(entries.values()))
        entries[name] = _run_check(name, flags.out)
    write_index(flags.out, TITLE, list(entries.values()))
    for entry in entries.values():
        print(f"{entry.name:<12}{entry.verdict}")
    print(f"{flags.out / 'index.html'}")
    return 0 if all(entry.passed for entry in entries.values()) else 1


def _run_check(name: str, out: Path) -> IndexEntry:
    """One check in a process of its own: what breaks in it leaves the others alone."""
    started = time.monotonic()
    report = out / name / "report.json"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "megatron_completedp.check", name, "--out", str(out / name)]
    code = subprocess.run(command, check=False).returncode
    seconds = f"({time.monotonic() - started:.0f} s)"
    if not report.exists():
        verdict = f"FAILED: stopped with exit code {code} before a report {seconds}"
        return IndexEntry(name=name, verdict=verdict, passed=False, href=None)
    found = json.loads(report.read_text(encoding="utf-8"))
    return IndexEntry(
        name=name,
        verdict=f"{found['verdict']} {seconds}",
        passed=found["passed"] and code == 0,
        href=f"{name}/report.html",
    )
