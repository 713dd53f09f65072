"""The settings of a check from its YAML and its flags, by the same rules as a run's."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatron_completedp.config.cli import read_arguments
from megatron_completedp.config.load import build
from megatron_completedp.errors import ConfigError

T = TypeVar("T")

PROG = "python -m megatron_completedp.check"


@dataclass(frozen=True, kw_only=True)
class OutFlag:
    """Where a check writes, which is no setting of what it measures."""

    out: str | None = None
    """Folder for results.jsonl, figures and report.html; the default is runs/checks/NAME."""


def load_settings(
    cls: type[T], argv: Sequence[str], *, name: str, description: str
) -> tuple[T, Path]:
    """The settings of check `name`, and its output folder, that `argv` describes.

    Flags override the YAML of `--config`, which overrides the defaults. A path under `run:` in the
    YAML is relative to the YAML's folder, so that the two can move together; as a flag it is
    relative to the working directory. Raises ConfigError for a bad value; usage errors and `--help`
    leave through SystemExit.
    """
    tree, flags = read_arguments(
        argv, cls, prog=f"{PROG} {name}", description=description, extra=OutFlag
    )
    _resolve_run(tree, argv)
    out = tree.pop("out", f"runs/checks/{name}")
    if not isinstance(out, str):
        raise ConfigError(f"out is {out!r}; expected the path of a folder.")
    return build(cls, tree), Path(flags.out or out)


def _resolve_run(tree: dict[str, Any], argv: Sequence[str]) -> None:
    """Make `run:` relative to the YAML it stands in, when it stands in one."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--run")
    given, _ = parser.parse_known_args(argv)
    run = tree.get("run")
    if given.config and given.run is None and isinstance(run, str) and run:
        tree["run"] = str(Path(given.config).parent / run)


def command_line() -> str:
    """The command as it was typed, to be repeated from a report."""
    return f"{PROG} {shlex.join(sys.argv[1:])}".rstrip()
