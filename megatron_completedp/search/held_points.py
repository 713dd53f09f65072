"""The points that finished studies held for the best at equal budgets, trained with fresh seeds.

A search's own losses flatter it: it kept what came out low. These runs have seeds and text that no
choice has seen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import optuna

from megatron_completedp.config.load import identity, load_config
from megatron_completedp.errors import ConfigError
from megatron_completedp.plan.run_plan import Plan
from megatron_completedp.search.attributes import IDENTITY, TEXT
from megatron_completedp.search.compare_settings import CompareSettings
from megatron_completedp.search.heldout import check_seeds, every_seed, on_heldout, text_of
from megatron_completedp.search.history import History
from megatron_completedp.search.importance import in_the_valley, predicted, rows_of
from megatron_completedp.search.queue import begun
from megatron_completedp.search.samplers import SamplerName
from megatron_completedp.search.space import Space
from megatron_completedp.search.surrogate import Row, Surrogate, fit
from megatron_completedp.search.trials_file import read_export
from megatron_completedp.study.points import as_point, numbers_hash
from megatron_completedp.study.results import Results, differences, in_words, text_differences
from megatron_completedp.study.tasks import Point, train_points


class HeldPoints:
    """The studies of several samplers on one space, and the runs of what they held."""

    def __init__(self, settings: CompareSettings, folder: Path) -> None:
        """Raises ConfigError for studies that cannot be compared.

        They are of different spaces or another run, pruned, one study twice, shorter than a budget,
        or had the seeds.
        """
        self.settings = settings
        self.folder = folder
        base = as_point(load_config(settings.run))
        self.base = on_heldout(base, settings.heldout)
        studies = {
            name: [read_export(Path(path)) for path in paths]
            for name, paths in settings.studies.items()
        }
        every = [study for group in studies.values() for study in group]
        first = every[0].user_attrs[IDENTITY]
        for study in every:
            own = study.user_attrs[IDENTITY]
            found = list(differences(first["space"], own["space"], "space"))
            found += differences(own["run"], json.loads(json.dumps(identity(base))), "run")
            for name in ("seeds", "samples"):
                found += differences(first[name], own[name], name)
            found += text_differences(study.user_attrs.get(TEXT, {}), text_of(base))
            if found:
                raise ConfigError(
                    f"the study {study.study_name!r} is no search of the same kind: "
                    f"{in_words(found)}. Compare studies of one run, level and bounds, whose "
                    "trials cost the same."
                )
            if own["proposals"]["prune"]:
                raise ConfigError(
                    f"the study {study.study_name!r} stopped trials early (prune): at equal trials "
                    "it was given less. Compare studies without it."
                )
        _check_repeats(studies)
        self.space = Space.of(base, first["space"]["level"], first["space"]["bounds"])
        self.histories = {
            name: [History(study, self.space) for study in group] for name, group in studies.items()
        }
        self.ceiling = math.log(base.model.vocab_size)
        for one in (one for group in self.histories.values() for one in group):
            _check_budget(one, max(settings.budgets))
            check_seeds(settings.seeds, every_seed(one.study, base.seed))

    def surrogate(self) -> Surrogate:
        """Fitted to the trials of all studies that lie in the valley: see `in_the_valley`.

        Of each study only as many as the largest budget, so that none weighs more than another.
        """
        return fit(self._rows(), self.space.distributions(), ceiling=self.ceiling)

    def predicted(self) -> float:
        """Share of the variance of left-out trials that the surrogate's fit predicts."""
        rows = [row for row in self._rows() if not row.diverged]
        return predicted(rows, self.space.distributions(), ceiling=self.ceiling)

    def _rows(self) -> list[Row]:
        every = [
            row
            for group in self.histories.values()
            for one in group
            for row in rows_of(one, max(self.settings.budgets))
        ]
        return in_the_valley(every)

    def options(self) -> dict[str, Mapping[str, Any]]:
        """The options of the studies' samplers, by sampler, for the surrogate."""
        of = {
            name: group[0].study.user_attrs[IDENTITY]["proposals"]
            for name, group in self.histories.items()
        }
        return {name: each["options"] for name, each in of.items() if each["sampler"] == name}

    def train(self, out: Path) -> list[dict[str, Any]]:
        """Train what has no row in OUT/results.jsonl; every row."""
        results = Results(
            out / "results.jsonl",
            {
                "samples": self.base.evaluation.samples,
                "run": identity(self.base, "seed", "hyperparams", "multipliers"),
            },
            text=text_of(self.base),
        )
        train_points(
            [self.run(held, seed) for seed in self.settings.seeds for held in [{}, *self._held()]],
            results,
            folder=self.folder,
            workers=self.settings.workers,
            ranks=self.settings.ranks,
        )
        return results.rows()

    def gains(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[list[list[float]]]]:
        """Nats below the base run by sampler: one list per study, budget and seed.

        0 while a study has no point yet: it would use the base run. -inf where the run diverged.
        """
        losses = {row["id"]: math.inf if row["diverged"] else float(row["loss"]) for row in rows}
        for seed in self.settings.seeds:
            if math.isinf(losses[self.run({}, seed).id]):
                raise ConfigError(
                    f"the base run of {self.settings.run} diverged with seed {seed}, so that no "
                    "gain over it can be told. Give other seeds, or a base run that trains."
                )

        def gain(held: Mapping[str, float], seed: int) -> float:
            start, found = (losses[self.run(each, seed).id] for each in ({}, held))
            return start - found

        return {
            name: [
                [
                    [gain(one.best_after(budget) or {}, seed) for seed in self.settings.seeds]
                    for budget in self.settings.budgets
                ]
                for one in group
            ]
            for name, group in self.histories.items()
        }

    def _held(self) -> list[Mapping[str, float]]:
        found = [
            one.best_after(budget)
            for group in self.histories.values()
            for one in group
            for budget in self.settings.budgets
        ]
        return [point for point in found if point is not None]

    def run(self, point: Mapping[str, float], seed: int) -> Point:
        """The run of `point`; points that give it the same numbers share it."""
        config = self.space.apply(self.base, point)
        name = f"seed{seed}_{numbers_hash(Plan.of(config))}"
        config = replace(config, seed=seed, run_dir=str(self.folder / name))
        return Point(id=name, config=config, labels={"seed": seed})


def _check_repeats(studies: Mapping[str, Sequence[optuna.Study]]) -> None:
    """Raise ConfigError for repeats that are no repeats: of two kinds, or with one seed."""
    kinds: dict[str, str] = {}
    for name, group in studies.items():
        proposals = [study.user_attrs[IDENTITY]["proposals"] for study in group]
        kind = {json.dumps([each["sampler"], each["options"]]) for each in proposals}
        if len(kind) > 1:
            raise ConfigError(
                f"studies.{name} has studies of different samplers or options: "
                f"{'; '.join(sorted(kind))}. Give each a name of its own."
            )
        if len({each["seed"] for each in proposals}) < len(proposals):
            raise ConfigError(
                f"studies.{name} has two studies of one seed, which propose the same points; a "
                "repeat has a seed of its own."
            )
        sampler = proposals[0]["sampler"]
        if name in get_args(SamplerName) and name != sampler:
            raise ConfigError(
                f"studies.{name} has studies of the sampler {sampler}; give them under its own "
                "name, or under one that is no sampler's."
            )
        if (other := kinds.setdefault(kind.pop(), name)) != name:
            raise ConfigError(
                f"studies.{other} and studies.{name} are of one sampler with the same options; "
                "give their studies as repeats under one name."
            )


def _check_budget(history: History, budget: int) -> None:
    ended = begun(history.trials) - sum(not trial.state.is_finished() for trial in history.trials)
    if ended < budget:
        raise ConfigError(
            f"the study {history.study.study_name!r} has {ended} trials, fewer than the budget of "
            f"{budget}: it would be compared at less. Let it go on, or lower budgets."
        )
