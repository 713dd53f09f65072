"""`python -m megatron_completedp.search`: run a search, join it, look at it, take its recipe."""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_completedp.config.cli import run_command
from megatron_completedp.errors import ConfigError
from megatron_completedp.search.settings import SearchSettings
from megatron_completedp.study.settings import OutFlag, load_study

PROG = "python -m megatron_completedp.search"


@dataclass(frozen=True, kw_only=True)
class StatusFlags(OutFlag):
    """Flags of `status` alone."""

    target: str | None = None
    """YAML of the run that the search is for; the cost is given as a share of its FLOPs."""


@dataclass(frozen=True, kw_only=True)
class RecipeFlags(OutFlag):
    """Flags of `recipe` alone."""

    to: str = "recipe.yaml"
    """The file to write."""
    heldout_runs: int = 3
    """Fresh runs of the best point for the loss on heldout, where the settings name some."""


@dataclass(frozen=True)
class Command:
    """One thing to do with a search."""

    summary: str
    """In a line."""
    details: str
    """The rest of its own help."""
    flags: type[OutFlag]
    """What it takes beside the settings."""
    do: Callable[[SearchSettings, Path, OutFlag], None]


def _run(settings: SearchSettings, out: Path, flags: OutFlag) -> None:
    from megatron_completedp.search.worker import Search, run

    run(Search(settings, out))


def _work(settings: SearchSettings, out: Path, flags: OutFlag) -> None:
    from megatron_completedp.search.worker import Search, work

    work(Search(settings, out))


def _status(settings: SearchSettings, out: Path, flags: OutFlag) -> None:
    from megatron_completedp.search.status import status
    from megatron_completedp.search.worker import Search, read

    assert isinstance(flags, StatusFlags), "of this command"
    print(status(read(Search(settings, out)), settings, target=flags.target))


def _recipe(settings: SearchSettings, out: Path, flags: OutFlag) -> None:
    from megatron_completedp.search.export import export
    from megatron_completedp.search.worker import Search, read

    assert isinstance(flags, RecipeFlags), "of this command"
    search = Search(settings, out)
    found = export(
        read(search),
        search.objective(),
        settings,
        out=out,
        recipe=Path(flags.to),
        heldout_runs=flags.heldout_runs,
    )
    origin = found.provenance
    print(f"{flags.to}: loss {origin.loss:.4f} nats/token after {origin.trials} trials")
    if origin.heldout_loss is not None:
        print(f"held out: {origin.heldout_loss:.4f}, mean of {flags.heldout_runs} fresh runs")


COMMANDS: dict[str, Command] = {
    "run": Command(
        "Train trials by workers of this machine until all have ended.",
        "Killed or stopped, it goes on where it was when started again; with a higher --trials it "
        "extends the study.",
        OutFlag,
        _run,
    ),
    "worker": Command(
        "Be one worker of a search that others work on, too.",
        "Workers come and go. Those of several machines need a database.url that all reach and an "
        "output folder that all see (NFS, or Lustre mounted with -o flock).",
        OutFlag,
        _work,
    ),
    "status": Command(
        "Print how far a search is, its best point and its cost.",
        "Only reads; a search may be running.",
        StatusFlags,
        _status,
    ),
    "recipe": Command(
        "Write the best point as a recipe, which plan and train take with --recipe.",
        "Where the settings name heldout, the point is trained again to be evaluated there.",
        RecipeFlags,
        _recipe,
    ),
}


def usage() -> str:
    """The text of `--help` without a command's name."""
    lines = [f"usage: {PROG} COMMAND --config search.yaml [--out FOLDER] [flags]", ""]
    lines += [f"  {name:<10}{command.summary}" for name, command in COMMANDS.items()]
    lines += [
        "",
        "The study is an Optuna study in a database: study.db in FOLDER unless database.url names",
        "another; optuna-dashboard opens it. Runs and logs are in FOLDER (runs/searches/NAME).",
        "Exits with 0 when done, 1 for an error, 2 for usage and configuration, 75 when a signal",
        f"stopped it. `{PROG} COMMAND --help` lists the flags.",
        "",
        "Example:",
        f"  {PROG} run --config search.yaml --out runs/search --workers 4",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Do what `argv` says. Returns 0; whatever goes wrong is raised."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    name, *rest = argv
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(COMMANDS)}."
        raise ConfigError(f"unknown command {name!r}; {hint}")
    command = COMMANDS[name]
    settings, out, flags = load_study(
        SearchSettings,
        rest,
        prog=f"{PROG} {name}",
        description=f"{command.summary} {command.details}\n\nExample:\n  {PROG} {name} "
        "--config search.yaml --out runs/search",
        extra=command.flags,
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{PROG} needs packages that are not installed ({error}): "
            "pip install 'megatron_completedp[search]'."
        ) from error
    command.do(settings, out or Path("runs/searches") / settings.name, flags)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
