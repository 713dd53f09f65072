"""`python -m megatron_completedp.check`: one check, or all of them, with a verdict and a report."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from megatron_completedp.check.settings import PROG, load_settings
from megatron_completedp.config.cli import run_command
from megatron_completedp.errors import ConfigError
from megatron_completedp.study.report import print_report


@dataclass(frozen=True)
class Check:
    """Where a check is; its module is imported only when it is asked for."""

    module: str
    """Has `run(settings, out) -> Report`."""
    settings: str
    """The settings dataclass in that module."""
    summary: str
    """What it asks, in a line."""
    example: str
    """Flags of an example."""


def _check(name: str, summary: str, example: str) -> Check:
    module = f"megatron_completedp.check.{name}"
    return Check(module, f"{name.capitalize()}Settings", summary, example)


CHECKS: dict[str, Check] = {
    name: _check(name, summary, example)
    for name, summary, example in (
        ("coordinate", "Do activations and their updates keep their size in width and depth?", ""),
        ("gradient", "Do gradients scale in width and depth as the rules were derived?", ""),
        ("eps", "Do Adam's updates keep their size when eps is as large as the gradient?", ""),
        ("sde", "Do batch and duration leave the noise of training as it was?", ""),
        ("transfer", "Does the best learning rate stay where the base has it?", "--axis width"),
        ("mutation", "Which check sees a wrong exponent, for every cell of the table?", ""),
    )
}


def usage() -> str:
    """The text of `--help` without a check's name."""
    lines = [f"usage: {PROG} NAME [--config check.yaml] [--out FOLDER] [flags]", ""]
    lines += [f"  {name:<12}{check.summary}" for name, check in CHECKS.items()]
    lines += [
        f"  {'all':<12}The default small suite: every check but mutation, and an index.html.",
        "",
        "Writes results.jsonl, figures (PNG, SVG), report.html and report.json into FOLDER.",
        "Exits with 0 when the check passed, 1 when it failed, 2 for usage and configuration, 75",
        "when a signal stopped transfer, which then goes on where it was.",
        f"`{PROG} NAME --help` lists the flags.",
        "",
        "Example:",
        f"  {PROG} coordinate --out runs/checks/coordinate",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Run the check that `argv` names. Returns 0 when it passed and 1 when it failed.

    Under torchrun every rank measures; rank 0 writes, prints and has the exit code.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    name, *rest = argv
    if name == "all":
        from megatron_completedp.check.suite import run_suite

        return run_suite(rest)
    if name not in CHECKS:
        near = difflib.get_close_matches(name, [*CHECKS, "all"])
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(CHECKS)}, all."
        raise ConfigError(f"unknown check {name!r}; {hint}")
    return _run_check(name, rest)


def _run_check(name: str, argv: Sequence[str]) -> int:
    check = CHECKS[name]
    module = import_module(check.module)
    example = f"{PROG} {name} --out runs/checks/{name} {check.example}".rstrip()
    settings, out = load_settings(
        getattr(module, check.settings),
        argv,
        name=name,
        description=f"{check.summary}\n\nExample:\n  {example}",
    )
    report = module.run(settings, out)
    # The others' verdict is the same, but torchrun would end rank 0 for it before it has written.
    if os.environ.get("RANK", "0") != "0":
        return 0
    # Drawing needs matplotlib, which --help and bad flags should not wait for.
    from megatron_completedp.study.page import write_report

    write_report(out, report)
    print(print_report(report))
    print(f"\n{out / 'report.html'}")
    if report.afterwards:
        print(report.afterwards())
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(run_command(main))
