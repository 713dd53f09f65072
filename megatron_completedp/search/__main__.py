"""`python -m megatron_completedp.search`: run a search, join it, show it, take its recipe."""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_completedp.config.cli import run_command
from megatron_completedp.errors import ConfigError
from megatron_completedp.search.compare_settings import CompareSettings
from megatron_completedp.search.settings import SearchSettings
from megatron_completedp.search.transfer_settings import TransferSettings
from megatron_completedp.study.settings import OutFlag, command_line, load_study

if TYPE_CHECKING:
    from megatron_completedp.study.report import Report

PROG = "python -m megatron_completedp.search"


@dataclass(frozen=True, kw_only=True)
class RunFlags(OutFlag):
    """Flags of `run` alone."""

    dry_run: bool = False
    """Print what would be searched, with its bounds, and stop."""


@dataclass(frozen=True, kw_only=True)
class TargetFlags(OutFlag):
    """Flags of `status` and `report`."""

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
    do: Callable[[Any, Path, OutFlag], None]
    settings: type[Any] = SearchSettings
    """What its YAML is."""
    example: str = "--config search.yaml --out runs/search"
    """What follows its name in its own help."""


def _run(settings: SearchSettings, out: Path, flags: OutFlag) -> None:
    from megatron_completedp.search.access import Search
    from megatron_completedp.search.worker import run

    assert isinstance(flags, RunFlags), "of this command"
    search = Search(settings, out)
    if flags.dry_run:
        objective = search.objective()
        flops = objective.cost(objective.base.steps, 0.0).flops * objective.seeds
        print(objective.space.table())
        print(
            f"\n{settings.level}: {len(objective.space.dimensions)} dimensions, "
            f"{settings.trials} trials of {flops:.3g} FLOPs, into {out}"
        )
        return
    run(search)


def _work(settings: SearchSettings, out: Path, flags: OutFlag) -> None:
    from megatron_completedp.search.access import Search
    from megatron_completedp.search.worker import work

    work(Search(settings, out))


def _status(settings: SearchSettings, out: Path, flags: OutFlag) -> None:
    from megatron_completedp.search.access import Search, read
    from megatron_completedp.search.status import status

    assert isinstance(flags, TargetFlags), "of this command"
    print(status(read(Search(settings, out)), settings, target=flags.target))


def _recipe(settings: SearchSettings, out: Path, flags: OutFlag) -> None:
    from megatron_completedp.search.access import Search, read
    from megatron_completedp.search.export import export

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
        runs = len(origin.heldout_seeds)
        print(f"held out: {origin.heldout_loss:.4f}, mean of {runs} fresh runs")
    if origin.heldout_diverged:
        count, runs = len(origin.heldout_diverged), len(origin.heldout_seeds)
        seeds = ", ".join(map(str, origin.heldout_diverged))
        print(f"held out: {count} of {runs} fresh runs diverged, with the seeds {seeds}: no mean")


def _report(settings: SearchSettings, out: Path, flags: OutFlag) -> None:
    from megatron_completedp.search.access import Search
    from megatron_completedp.search.report import report

    assert isinstance(flags, TargetFlags), "of this command"
    _show(
        report(Search(settings, out), target=flags.target, command=command_line(PROG)),
        out,
    )


def _compare(settings: CompareSettings, out: Path, flags: OutFlag) -> None:
    from megatron_completedp.search.compare import run

    _show(run(settings, out, command=command_line(PROG)), out)


def _transfer(settings: TransferSettings, out: Path, flags: OutFlag) -> None:
    from megatron_completedp.search.transfer import run

    _show(run(settings, out, command=command_line(PROG)), out)


def _show(found: Report, out: Path) -> None:
    # Drawing needs matplotlib, which --help and bad flags should not wait for.
    from megatron_completedp.study.page import write_report
    from megatron_completedp.study.report import print_report

    write_report(out, found)
    print(print_report(found))
    print(f"\n{out / 'report.html'}")


COMMANDS: dict[str, Command] = {
    "run": Command(
        "Train trials by workers of this machine until all have ended.",
        "Killed or stopped, it goes on where it was when started again; with a higher --trials it "
        "extends the study.",
        RunFlags,
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
        "Changes nothing of the study; a search may be running.",
        TargetFlags,
        _status,
    ),
    "recipe": Command(
        "Write the best point as a recipe, which plan and train take with --recipe.",
        "Where the settings name heldout, the point is trained again to be evaluated there.",
        RecipeFlags,
        _recipe,
        example="--config search.yaml --out runs/search --to recipe.yaml",
    ),
    "report": Command(
        "Show on one page what a search found, how sure that is and what it cost.",
        "Writes report.html, figures and trials.jsonl (every trial, small enough to keep) into the "
        "folder; where there is no study.db, draws from trials.jsonl alone.",
        TargetFlags,
        _report,
    ),
    "compare": Command(
        "Compare samplers at equal budget, on a surrogate and by what searches found.",
        "Its YAML names the trials.jsonl of finished studies; the points that they held for the "
        "best are trained again. Without any, the surrogate is a synthetic one.",
        OutFlag,
        _compare,
        CompareSettings,
        "--config compare.yaml --out runs/compare",
    ),
    "transfer": Command(
        "Measure how many tokens a recipe saves, at the proxy and where it is carried to.",
        "Its YAML names recipes of one base and the sizes. Killed or stopped, it goes on where it "
        "was when started again.",
        OutFlag,
        _transfer,
        TransferSettings,
        "--config transfer.yaml --out runs/transfer",
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
    """Do what `argv` says. Returns the exit code: 0, or 2 without a command; all else is raised."""
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
        command.settings,
        rest,
        prog=f"{PROG} {name}",
        description=f"{command.summary} {command.details}\n\nExample:\n"
        f"  {PROG} {name} {command.example}",
        extra=command.flags,
        paths=("run", "recipes", "studies"),
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(
            f"{PROG} needs packages that are not installed ({error}): "
            "pip install 'megatron_completedp[search]'."
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = settings.name if isinstance(settings, SearchSettings) else name
    command.do(settings, out or Path("runs/searches") / study, flags)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
