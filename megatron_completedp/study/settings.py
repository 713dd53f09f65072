"""The settings of a study from its YAML and its flags, by the same rules as a run's."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatron_completedp.config.cli import read_arguments
from megatron_completedp.config.load import build
from megatron_completedp.errors import ConfigError

T = TypeVar("T")
E = TypeVar("E", bound="OutFlag")


@dataclass(frozen=True, kw_only=True)
class OutFlag:
    """Where a study writes, which is no setting of what it measures."""

    out: str | None = None
    """Folder for the results, figures and report.html; the default is under runs/."""


def load_study(
    cls: type[T],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    extra: type[E],
    paths: Sequence[str] = ("run",),
) -> tuple[T, Path | None, E]:
    """The settings of a study, its output folder if given, and the command's own flags.

    Flags override the YAML of `--config`, which overrides the defaults. Under the keys `paths` the
    YAML has paths relative to its own folder, so that the files can move together; as a flag they
    are relative to the working directory. Raises ConfigError for a bad value; usage errors and
    `--help` leave through SystemExit.
    """
    tree, flags = read_arguments(argv, cls, prog=prog, description=description, extra=extra)
    for key in paths:
        _resolve(tree, argv, key)
    out = tree.pop("out", None)
    if out is not None and not isinstance(out, str):
        raise ConfigError(f"out is {out!r}; expected the path of a folder.")
    out = flags.out or out
    return build(cls, tree), Path(out) if out else None, flags


def _resolve(tree: dict[str, Any], argv: Sequence[str], key: str) -> None:
    """Make the paths under `key` relative to the YAML they stand in, when they stand in one."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument(f"--{key}", dest="path")
    given, _ = parser.parse_known_args(argv)
    if given.config and given.path is None and key in tree:
        tree[key] = _below(Path(given.config).parent, tree[key])


def _below(folder: Path, value: object) -> object:
    """`value`, or every text in it, as a path from `folder`; an empty text names no path."""
    if isinstance(value, Mapping):
        return {name: _below(folder, item) for name, item in value.items()}
    if isinstance(value, list):
        return [_below(folder, item) for item in value]
    return str(folder / value) if isinstance(value, str) and value else value


def command_line(prog: str) -> str:
    """The command `prog` as it was typed but for passwords, to be repeated from a report."""
    return masked(f"{prog} {shlex.join(sys.argv[1:])}".rstrip())


def masked(text: str) -> str:
    """`text` without what may be a password in a URL, however the URL is misspelt.

    That is, in a word, what stands between the first colon and the last `@`, or after `password=`.
    """
    text = re.sub(r"(:/*)[^\s:][^\s]*@", r"\1***@", text)
    return re.sub(r"(password=)[^\s&']*", r"\1***", text)
