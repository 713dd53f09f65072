"""The settings of a check, and the name of the command."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from megatron_completedp.errors import ConfigError
from megatron_completedp.study import settings

T = TypeVar("T")

PROG = "python -m megatron_completedp.check"


def load_settings(
    cls: type[T], argv: Sequence[str], *, name: str, description: str
) -> tuple[T, Path]:
    """The settings of check `name`, and its output folder, that `argv` describes.

    Errors as for `study.settings.load_study`; the folder is runs/checks/NAME unless given.
    """
    found, out, _ = settings.load_study(
        cls,
        argv,
        prog=f"{PROG} {name}",
        description=description,
        extra=settings.OutFlag,
    )
    return found, out or Path(f"runs/checks/{name}")


def check_values(name: str, values: Sequence[float], *, least: int, why: str = "") -> None:
    """Raise ConfigError for fewer than `least` values, which is bad for `why`, or one twice."""
    if len(values) < least:
        raise ConfigError(
            f"{name} is {list(values)}: {why}. Give at least {least} different values."
        )
    if len(set(values)) < len(values):
        raise ConfigError(f"{name} is {list(values)}; leave out what is there twice.")


def command_line() -> str:
    """The command as it was typed, to be repeated from a report."""
    return settings.command_line(PROG)
