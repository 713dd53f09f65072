"""Samplers on a surrogate of training.

Every sampler has the same number of runs, of which the first is the base run: trust_region runs it
by itself, the others are given it. Repeated runs count like any other.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from megatron_completedp.search.attributes import DIVERGED, REPLICATE
from megatron_completedp.search.samplers import make_sampler, quiet
from megatron_completedp.search.surrogate import Surrogate
from megatron_completedp.search.trust_region import TrustRegionSampler
from megatron_completedp.study.code import sources_hash
from megatron_completedp.study.results import Results

#: Nats gained over the base run, by sampler: by number of runs for each repeat or seed.
Gains = Mapping[str, Sequence[Mapping[int, float]]]


@dataclass(frozen=True)
class Step:
    """Where a sampler stands after one more run."""

    loss: float
    """Loss without noise of the point that the sampler recommends: its incumbent for trust_region,
    that of the lowest observed loss for the others. inf before there is one."""
    diverged: int
    """Runs that diverged so far."""


def simulate(
    surrogate: Surrogate,
    name: str,
    *,
    repeat: int,
    runs: int,
    region: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[Step]:
    """The steps of the sampler `name` in `runs` runs; its seed is `repeat`.

    `region` is `Space.trust_region()` of a real space, `settings` are the sampler's, both as
    `samplers.make_sampler` takes them. Raises ConfigError like that.
    """
    sampler = make_sampler(
        name, seed=repeat, space=surrogate.space, settings=settings, **(region or {})
    )
    # Apart from the samplers' own streams, which are seeded by the repeat as well.
    noise = np.random.default_rng([repeat, 1])
    # A point's run number r has the seed of every other's run number r.
    seeds = np.random.default_rng([repeat, 2]).normal(size=runs)
    lowest, loss, diverged = math.inf, math.inf, 0
    steps = []
    with _silent():
        study = optuna.create_study(sampler=sampler)
        if not isinstance(sampler, TrustRegionSampler):
            study.enqueue_trial(dict.fromkeys(surrogate.space, 0.0))
        for _ in range(runs):
            trial = study.ask({**surrogate.space})
            replicate = trial.user_attrs.get(REPLICATE, 0)
            observed = surrogate.observe(trial.params, noise, seed=seeds[replicate])
            if surrogate.diverges(trial.params):
                diverged += 1
                trial.set_user_attr(DIVERGED, True)
            study.tell(trial, observed)
            if isinstance(sampler, TrustRegionSampler):
                loss = surrogate.loss(sampler.params(study, sampler.state(study).incumbent))
            elif observed < lowest:
                lowest, loss = observed, surrogate.loss(trial.params)
            steps.append(Step(loss, diverged))
    return steps


def simulated(
    surrogate: Surrogate,
    samplers: Sequence[str],
    file: Path,
    *,
    runs: int,
    repeats: int,
    region: Mapping[str, Mapping[str, Any]],
    options: Mapping[str, Mapping[str, Any]],
) -> Gains:
    """Nats gained over the base without noise, by sampler: a curve over runs for each repeat.

    `options` are those of samplers that do not have their defaults, by sampler. Repeats are kept in
    `file` and not simulated again by the same code: gp and turbo take seconds for a proposal.
    Raises ConfigError for a sampler that cannot be made, before anything is run.
    """
    for name in samplers:
        make_sampler(name, seed=0, space=surrogate.space, settings=options.get(name), **region)
    start = surrogate.loss(dict.fromkeys(surrogate.valleys, 0.0))
    results = Results(file, {})
    # A row of another surrogate, length or code is left where it is, and not taken for these.
    key = surrogate_key(surrogate, region=region, options=options, runs=runs)

    def kept() -> dict[tuple[str, int], Sequence[float]]:
        own = (row for row in results.rows() if row["of"] == key)
        return {(row["sampler"], row["repeat"]): row["gains"] for row in own}

    done = kept()
    for name in samplers:
        for repeat in range(repeats):
            if (name, repeat) in done:
                continue
            steps = simulate(
                surrogate,
                name,
                repeat=repeat,
                runs=runs,
                region=region,
                settings=options.get(name),
            )
            # Before a point is recommended, the base run would be used.
            gains = [start - step.loss if math.isfinite(step.loss) else 0.0 for step in steps]
            row = {"of": key, "sampler": name, "repeat": repeat, "diverged": steps[-1].diverged}
            results.append({**row, "gains": [round(gain, 6) for gain in gains]})
    done = kept()
    return {
        name: [dict(enumerate(done[name, repeat], start=1)) for repeat in range(repeats)]
        for name in samplers
    }


def surrogate_key(
    surrogate: Surrogate,
    *,
    region: Mapping[str, Mapping[str, Any]],
    options: Mapping[str, Mapping[str, Any]],
    runs: int,
) -> str:
    """Identity of a simulated curve: surrogate to six digits, settings, the code that makes it."""
    of = surrogate
    rows: list[list[object]] = [[of.level, of.noise, of.seed_noise, of.ceiling, runs]]
    for name, valley in of.valleys.items():
        rows.append([name, *astuple(valley), *(each[name] for each in region.values())])
    for name, given in sorted(options.items()):
        rows.append([name, *sorted(given.items())])
    text = [[f"{x:.6g}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    return hashlib.sha256(f"{text} {sources_hash(__name__)}".encode()).hexdigest()[:16]


@contextmanager
def _silent() -> Iterator[None]:
    """A study per repeat would say at each creation that it was created."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with quiet():
            yield
    finally:
        optuna.logging.set_verbosity(before)
