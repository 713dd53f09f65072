"""Samplers against each other on a surrogate, at equal budget.

Every sampler has the same number of runs, of which the first is the base run: trust_region runs it
by itself, the others are given it. Repeated runs count like any other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna

from megatron_completedp.search.samplers import make_sampler, quiet
from megatron_completedp.search.surrogate import Surrogate
from megatron_completedp.search.trust_region import TrustRegionSampler
from megatron_completedp.search.trust_trials import DIVERGED, REPLICATE


@dataclass(frozen=True)
class Step:
    """Where a sampler stands after one more run."""

    sampler: str
    repeat: int
    runs: int
    """Runs spent so far."""
    loss: float
    """Loss without noise of the point that the sampler recommends: its incumbent for trust_region,
    that of the lowest observed loss for the others."""
    diverged: int
    """Runs that diverged so far."""


def compare(
    surrogate: Surrogate,
    samplers: Mapping[str, Mapping[str, Any]] | Sequence[str],
    *,
    runs: int,
    repeats: int,
    region: Mapping[str, Any] | None = None,
    leave_out: Collection[tuple[str, int]] = (),
) -> Iterator[Step]:
    """The steps of every sampler, repeat by repeat; repeat r has the seed r.

    Without the (sampler, repeat) in `leave_out`.

    `samplers` are names of `samplers.SamplerName`, or labels with settings, in which `name` names
    the sampler where the label does not: {"no guard": {"name": "trust_region", "guard": 0}}.
    `region` is `Space.trust_region()` of a real space.
    """
    if not isinstance(samplers, Mapping):
        samplers = {name: {} for name in samplers}

    of = region or {}

    def make(label: str, seed: int) -> optuna.samplers.BaseSampler:
        rest = dict(samplers[label])
        name = rest.pop("name", label)
        return make_sampler(name, seed=seed, space=surrogate.space, settings=rest, **of)

    left = {
        label: [repeat for repeat in range(repeats) if (label, repeat) not in leave_out]
        for label in samplers
    }
    for label in filter(left.get, left):
        make(label, 0)  # what is wrong with one is said before any runs
    for label, wanted in left.items():
        for repeat in wanted:
            with _silent():
                yield from _steps(surrogate, label, make(label, repeat), runs, repeat)


def _steps(
    surrogate: Surrogate,
    label: str,
    sampler: optuna.samplers.BaseSampler,
    runs: int,
    repeat: int,
) -> Iterator[Step]:
    study = optuna.create_study(sampler=sampler)
    if not isinstance(sampler, TrustRegionSampler):
        study.enqueue_trial(dict.fromkeys(surrogate.space, 0.0))
    # Apart from the samplers' own streams, which are seeded by the repeat as well.
    noise = np.random.default_rng([repeat, 1])
    # A point's run number r has the seed of every other's run number r.
    seeds = np.random.default_rng([repeat, 2]).normal(size=runs)
    lowest, loss, diverged = np.inf, np.inf, 0
    for count in range(1, runs + 1):
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
        yield Step(label, repeat, count, loss, diverged)


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
