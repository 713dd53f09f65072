"""The recipe of a search's best point, with the loss on text that no trial saw."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType

import optuna
from optuna.trial import TrialState

from megatron_completedp import __version__
from megatron_completedp.config.load import identity
from megatron_completedp.config.recipe import Provenance, Recipe, save_recipe
from megatron_completedp.data.manifest import load_manifest
from megatron_completedp.errors import ConfigError
from megatron_completedp.plan.run_plan import Plan
from megatron_completedp.search.heldout import every_seed, on_heldout, text_of
from megatron_completedp.search.incumbent import Incumbent, incumbent
from megatron_completedp.search.objective import Objective
from megatron_completedp.search.settings import SearchSettings
from megatron_completedp.study.code import git_commit, sources_hash
from megatron_completedp.study.points import numbers_hash
from megatron_completedp.study.results import Results
from megatron_completedp.study.tasks import Point, train_points

#: Replicates from here on are no trial's: their seeds are free for the held-out runs.
FIRST_HELDOUT_REPLICATE = 10_000


def export(
    study: optuna.Study,
    objective: Objective,
    settings: SearchSettings,
    *,
    out: Path,
    recipe: Path,
    heldout_runs: int,
) -> Recipe:
    """Write the recipe of the study's best point to `recipe`.

    With `settings.heldout`, the point is trained `heldout_runs` times more, with seeds of which no
    trial had one, and evaluated there; these runs are kept in OUT/heldout. Raises ConfigError while
    no trial has ended well, and for a `recipe` that holds another.
    """
    if heldout_runs < 0:
        raise ConfigError(f"heldout_runs is {heldout_runs}; expected runs, or 0 for none.")
    best = incumbent(study)
    if best is None:
        raise ConfigError(
            f"no trial of {settings.name!r} has ended well, so there is no recipe to write yet. "
            "Let the search go on; where every trial diverges, start from a base run that trains."
        )
    config = objective.space.apply(objective.base, best.params)
    found = heldout_losses(objective, settings, best, out=out, runs=heldout_runs)
    losses = list(found.values())
    whole = bool(losses) and all(map(math.isfinite, losses))
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    provenance = Provenance(
        study=settings.name,
        trials=len(complete),
        seeds=tuple(sorted(every_seed(study, objective.base.seed))),
        loss=best.loss,
        loss_standard_error=_or_none(best.standard_error),
        diverged=best.diverged,
        heldout_loss=statistics.fmean(losses) if whole else None,
        heldout_loss_standard_error=_standard_error(losses) if whole else None,
        heldout_seeds=tuple(found),
        heldout_diverged=tuple(seed for seed, loss in found.items() if math.isinf(loss)),
        data=MappingProxyType(text_of(config)),
        tokenizer=load_manifest(Path(config.data.train[0])).tokenizer_sha256,
        code_version=__version__,
        git_commit=git_commit(),
        sources=sources_hash(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    written = Recipe.of(config, settings.level, provenance)
    save_recipe(recipe, written)
    return written


def heldout_losses(
    objective: Objective, settings: SearchSettings, best: Incumbent, *, out: Path, runs: int
) -> dict[int, float]:
    """Loss of `runs` fresh runs of the point on settings.heldout by seed; none without heldout.

    It is infinite for a run that diverged.
    """
    if not settings.heldout:
        return {}
    base = on_heldout(objective.base, settings.heldout)
    point = objective.space.apply(base, best.params)
    numbers = numbers_hash(Plan.of(point))
    points = []
    for index in range(runs):
        seed = objective.seeds_of(FIRST_HELDOUT_REPLICATE)[0] + index
        name = f"trial{best.trials[0]:04d}_{numbers}_seed{seed}"
        folder = out / "heldout" / name
        points.append(Point(name, replace(point, seed=seed, run_dir=str(folder)), {"seed": seed}))
    # A row's id has the point's numbers and the seed: another search may come to this folder.
    meaning = {"samples": base.evaluation.samples, "run": identity(base)}
    results = Results(out / "heldout" / "results.jsonl", meaning, text=text_of(base))
    train_points(
        points,
        results,
        folder=out / "heldout",
        workers=settings.workers,
        ranks=settings.ranks,
    )
    ours = {each.id for each in points}
    rows = [row for row in results.rows() if row["id"] in ours]
    return {row["seed"]: math.inf if row["diverged"] else float(row["loss"]) for row in rows}


def _standard_error(values: list[float]) -> float | None:
    if len(values) < 2:
        return None
    return statistics.stdev(values) / math.sqrt(len(values))


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
