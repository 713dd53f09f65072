"""A search's settings and folder, its study, and who proposes its trials."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from megatron_completedp.config.load import load_config
from megatron_completedp.config.recipe import load_recipe
from megatron_completedp.errors import ConfigError
from megatron_completedp.search.heldout import text_of
from megatron_completedp.search.objective import Objective
from megatron_completedp.search.outage import persist
from megatron_completedp.search.queue import Queue
from megatron_completedp.search.samplers import make_sampler, resolved_options
from megatron_completedp.search.settings import DATABASE_FILE, SearchSettings, database_url
from megatron_completedp.search.space import Space
from megatron_completedp.search.storage import check_identity, connect, load_study, open_study
from megatron_completedp.search.trials_file import FILE, read_export, write_export
from megatron_completedp.study.crew import Stop


@dataclass(frozen=True)
class Search:
    """A search and its folder."""

    settings: SearchSettings
    out: Path

    def objective(self) -> Objective:
        """The runs of its trials. Raises ConfigError for a base run that cannot be searched."""
        base = load_config(self.settings.run)
        if base.recipe is not None:
            _check_seed(base.seed, base.recipe.path)
        return Objective.of(self.settings, base, self.out)

    def identity(self) -> dict[str, Any]:
        """What the study's values mean, and how its trials are proposed."""
        settings = self.settings
        proposals = {
            "sampler": settings.sampler,
            "options": resolved_options(settings.sampler, settings.sampler_options),
            "seed": settings.seed,
            "prune": settings.prune,
        }
        return {**self.objective().identity, "proposals": proposals}

    def check(self, study: optuna.Study) -> None:
        """Raise ConfigError, with the differences, for a study that is another search."""
        text = text_of(self.objective().base)
        check_identity(study, self.identity(), text=text)

    def join(self, worker: str, stop: Stop) -> Queue:
        """The trials of the study, which is made if it does not exist, for the worker of this name.

        Raises ConfigError for a study that is another search, DatabaseUnreachable for none.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        settings, objective = self.settings, self.objective()
        sampler = sampler_by_slot(settings, objective.space)
        sampler(0)  # what is wrong with it is said before anything is begun
        identity, text = self.identity(), text_of(objective.base)
        # The trust region runs the start by itself, several times; the others do not know it.
        start = dict.fromkeys(objective.space.names, 0.0)
        first = None if settings.sampler == "trust_region" else start

        self.out.mkdir(parents=True, exist_ok=True)

        def enter() -> Queue:
            storage = connect(database_url(settings, self.out), settings.database, self.out)
            study = open_study(
                storage, settings.name, self.out, identity=identity, text=text, first=first
            )
            return Queue(
                study=study,
                storage=storage,
                sampler=sampler,
                objective=objective,
                out=self.out,
                trials=settings.trials,
                retries=settings.retries,
                worker=worker,
            )

        return persist(enter, settings.database, stop)


def _check_seed(seed: int, path: str) -> None:
    """Raise ConfigError for a seed from which a search would come to those behind the recipe."""
    recipe, _ = load_recipe(path)
    # Runs count up from the seed.
    if ahead := [had for had in recipe.provenance.seeds if had >= seed]:
        raise ConfigError(
            f"seed is {seed}, and runs count up from it to {min(ahead)}, with which the search "
            f"behind {path} chose this very point: its run of that seed is low by luck, and others "
            f"look worse beside it. Give the run a later one, such as seed: {max(ahead) + 1000}."
        )


def read(search: Search) -> optuna.Study:
    """The search's study with its sampler, to be read.

    Nothing of the study is changed; its database gets its tables, and OUT a folder for locks, where
    they are missing.

    Raises ConfigError when there is none, and for one that is another search.
    """
    settings, file = search.settings, search.out / DATABASE_FILE
    if not settings.database.url and not file.exists():
        raise ConfigError(f"there is no {file}; start the search with `run`, or correct --out.")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = database_url(settings, search.out)
    study = persist(
        lambda: load_study(connect(url, settings.database, search.out), settings.name),
        settings.database,
    )
    search.check(study)
    study.sampler = sampler_by_slot(settings, search.objective().space)(0)
    return study


def load(search: Search) -> optuna.Study:
    """The study: of its database, and then exported to OUT/trials.jsonl, or of that file.

    Raises ConfigError when there is neither, and for a study that is another search.
    """
    file = search.out / FILE
    here = search.out / DATABASE_FILE
    if not search.settings.database.url and not here.exists() and file.exists():
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = read_export(file)
        search.check(study)
    else:
        study = read(search)
        write_export(study, file)
    return study


def sampler_by_slot(
    settings: SearchSettings, space: Space
) -> Callable[[int], optuna.samplers.BaseSampler]:
    """The sampler for the trial of a slot.

    Ours draws by slot itself, and a Sobol sequence (TuRBO's first trials are one, too) is one for
    all trials. The others carry random numbers from one proposal to the next; they are made anew
    for each trial, with a seed of its own, so that no two workers draw the same.
    """

    @lru_cache(maxsize=1)
    def made(seed: int) -> optuna.samplers.BaseSampler:
        return make_sampler(
            settings.sampler,
            seed=seed,
            space=space.distributions(),
            **space.trust_region(),
            settings=settings.sampler_options,
        )

    def of(slot: int) -> optuna.samplers.BaseSampler:
        if settings.sampler in ("trust_region", "qmc", "turbo"):
            return made(settings.seed)
        return made(int(np.random.SeedSequence([settings.seed, slot]).generate_state(1)[0]))

    return of
