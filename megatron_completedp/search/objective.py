"""A trial as training runs, each in its own folder, and what they say.

Diverged, not finite, worse than knowing nothing: these are results. Such a trial is complete, its
value is the ceiling ln(vocab_size), and its attribute `diverged` keeps it out of every mean.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_completedp.config.load import identity, load_config, to_yaml
from megatron_completedp.config.run import RunConfig, check_world
from megatron_completedp.data.atomic import atomic_write
from megatron_completedp.data.jsonl import read_whole_rows
from megatron_completedp.errors import ConfigError
from megatron_completedp.mcore.store import list_checkpoints, step_of
from megatron_completedp.search.heldout import check_heldout, seeds_of
from megatron_completedp.search.settings import TRIALS_FOLDER, SearchSettings
from megatron_completedp.search.space import Space
from megatron_completedp.study.points import as_point, outcome, train_point
from megatron_completedp.train import folder as run_folder


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a try of a trial cost; its fields are the trial's user attributes."""

    seconds: float
    """By the clock; times the ranks they are device-seconds."""
    steps: int
    """Optimizer steps that this try made; one that only read finished runs made none."""
    tokens: int
    """Trained on in these steps."""
    flops: float
    """6 x parameters x these tokens."""


@dataclass(frozen=True, kw_only=True)
class Facts(Cost):
    """What a trial found, and the cost of its last try."""

    losses: tuple[float | None, ...]
    """Validation loss of each seed, nats per token; None for the one that diverged, the last."""
    diverged: bool
    """One seed did; the ones after it were not trained."""
    configs: tuple[str, ...]
    """The runs' YAML files, in the output folder."""


@dataclass(frozen=True)
class Objective:
    """The runs of a search's trials."""

    base: RunConfig
    """As every trial trains it, but for the point and the seed."""
    space: Space
    seeds: int
    ranks: int
    folder: Path
    """Of the trials' run folders."""

    @classmethod
    def of(cls, settings: SearchSettings, base: RunConfig, out: Path) -> Objective:
        """Raises ConfigError for a base run that no trial could be compared by."""
        base = as_point(base)
        if not base.data.valid:
            raise ConfigError(
                f"{settings.run}: data.valid is empty; a search compares validation losses. Name "
                "token files there that the reported metric does not use."
            )
        check_heldout(base.data, settings.heldout)
        check_world(base, settings.ranks)
        return cls(
            base=base,
            space=Space.of(base, settings.level, settings.bounds),
            seeds=settings.seeds,
            ranks=settings.ranks,
            folder=out / TRIALS_FOLDER,
        )

    @property
    def identity(self) -> dict[str, Any]:
        """What a trial's value means; the settings of the proposals are not in it."""
        return {
            "run": identity(self.base),
            "samples": self.base.evaluation.samples,
            "space": self.space.identity,
            "seeds": self.seeds,
        }

    @property
    def ceiling(self) -> float:
        """The value of a diverged trial: the loss of a model that knows nothing, ln(vocab_size)."""
        return math.log(self.base.model.vocab_size)

    def configs(
        self, params: Mapping[str, float], *, name: str, replicate: int
    ) -> Iterator[tuple[Path, RunConfig]]:
        """The runs of the trial `name`, with their YAML files; no two replicates share a seed.

        Every point's first run has the same seeds, so that points differ by their numbers alone.
        """
        config = self.space.apply(self.base, params)
        for index, seed in enumerate(self.seeds_of(replicate)):
            own = f"{name}-seed{index}" if self.seeds > 1 else name
            run = replace(config, seed=seed, run_dir=str(self.folder / own))
            yield self.folder / f"{own}.yaml", run

    def seeds_of(self, replicate: int) -> range:
        """The seeds of a point's run number `replicate`; no two of its runs share one."""
        return seeds_of(self.base.seed, self.seeds, replicate)

    def train(
        self,
        params: Mapping[str, float],
        *,
        name: str,
        replicate: int,
        stop: Callable[[], bool],
    ) -> Facts | Cost:
        """Train the trial to its end, from where an earlier try stopped.

        Its cost alone where `stop`, which is asked throughout, or a signal ended it. Raises
        CompletedPError for runs that cannot be trained.
        """
        runs = list(self.configs(params, name=name, replicate=replicate))
        start, before = time.perf_counter(), sum(kept_steps(config) for _, config in runs)
        losses: list[float | None] = []
        for file, config in runs:
            if stop():
                break
            self._write(file, config)
            row = train_point(file, ranks=self.ranks, stop=stop)
            if row is None:
                break
            losses.append(row["loss"])
            if row["diverged"]:
                break
        steps = sum(last_step(config) for _, config in runs) - before
        cost = self.cost(steps, time.perf_counter() - start)
        diverged = losses[-1:] == [None]
        if len(losses) < self.seeds and not diverged:
            return cost
        files = tuple(f"{self.folder.name}/{file.name}" for file, _ in runs[: len(losses)])
        return Facts(**vars(cost), losses=tuple(losses), diverged=diverged, configs=files)

    def _write(self, file: Path, config: RunConfig) -> None:
        """Write the run's YAML; a finished run of another one would be read as this trial's."""
        if file.exists():
            old = load_config(file)
            samples = (old.evaluation.samples, config.evaluation.samples)
            if identity(old) != identity(config) or samples[0] != samples[1]:
                raise ConfigError(
                    f"{file} is a trial of another search. Give this one another --out, or remove "
                    f"{self.folder}."
                )
        with atomic_write(file) as stream:
            stream.write(to_yaml(config).encode())

    def value(self, facts: Facts) -> float:
        """What the sampler minimizes: the mean over the seeds, or the ceiling."""
        finite = [loss for loss in facts.losses if loss is not None]
        return self.ceiling if facts.diverged else sum(finite) / len(finite)

    def cost(self, steps: int, seconds: float) -> Cost:
        """Of a try that made `steps` in `seconds`."""
        tokens = steps * self.base.batch_tokens
        flops = 6.0 * self.base.model.parameters * tokens
        return Cost(seconds=round(seconds, 2), steps=steps, tokens=tokens, flops=flops)


def last_step(config: RunConfig) -> int:
    """The last optimizer step in the run's metrics; 0 before the first."""
    rows = read_whole_rows(Path(config.run_dir) / run_folder.METRICS_FILE)
    return int(rows[-1]["step"]) if rows else 0


def kept_steps(config: RunConfig) -> int:
    """The steps of earlier tries that the next one does not repeat."""
    if outcome(config) is not None:
        return last_step(config)
    # The metrics may go on beyond the save: of a try that was killed after it had resumed there.
    saved = list_checkpoints(Path(config.run_dir) / run_folder.CHECKPOINTS)
    return step_of(saved[-1]) if saved else 0
