"""What a search knew: its points with their runs, the noise of the seeds, and its best so far.

A point's runs are the trials with its numbers. The first run of a point that a sampler chose to
keep for its low loss is biased low: the mean of a point is that of its other runs, and a point
without any is marked as biased.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from statistics import fmean

import optuna
from optuna.trial import FrozenTrial, TrialState

from megatron_completedp.search.attributes import IDENTITY, ended_well, is_repetition, replicate_of
from megatron_completedp.search.incumbent import incumbent
from megatron_completedp.search.samplers import make_sampler
from megatron_completedp.search.seed_noise import Gain, SeedNoise, near_lowest
from megatron_completedp.search.space import Space
from megatron_completedp.search.trust_rules import Rules
from megatron_completedp.study.fit import Interval, pooled_deviation, student


@dataclass(frozen=True)
class Estimate:
    """A point's loss, nats per token."""

    mean: float
    """NaN without a run that ended well."""
    runs: int
    """How many runs it is the mean of."""
    biased: bool
    """Of the one run that the point was chosen for: too low by about the noise or more."""
    noise: float
    """Standard deviation of a run over seeds; NaN where no point was repeated."""
    freedom: int
    """Degrees of freedom of `noise`, which is pooled over all repeated points."""

    @property
    def standard_error(self) -> float:
        """Of the mean; NaN where it is biased or the noise is not known."""
        return math.nan if self.biased or not self.runs else self.noise / math.sqrt(self.runs)

    @property
    def interval(self) -> Interval:
        """Of the mean, by Student's t for the noise's degrees of freedom."""
        return student(self.mean, self.standard_error**2, self.freedom)


@dataclass(frozen=True)
class Held:
    """The point that was held for the best."""

    since: int
    """Trials begun, repetitions of lost ones left out, when it took over."""
    point: Mapping[str, float]


@dataclass(frozen=True)
class History:
    """The trials of a study over a space."""

    study: optuna.Study
    space: Space

    @cached_property
    def trials(self) -> Sequence[FrozenTrial]:
        """All of them, running ones too, in the order they were begun."""
        return self.study.get_trials(deepcopy=False)

    @cached_property
    def places(self) -> Mapping[int, int]:
        """How many trials had begun, repetitions left out, once this one had; by trial number."""
        firsts = (not is_repetition(trial) for trial in self.trials)
        return dict(enumerate(accumulate(firsts)))

    @cached_property
    def finished(self) -> Sequence[FrozenTrial]:
        """Those with a result, the diverged included."""
        return [trial for trial in self.trials if trial.state == TrialState.COMPLETE]

    @cached_property
    def well(self) -> Sequence[FrozenTrial]:
        """Those that did not diverge."""
        return [trial for trial in self.finished if ended_well(trial)]

    @cached_property
    def _by_point(self) -> Mapping[tuple[float, ...], Sequence[FrozenTrial]]:
        found: dict[tuple[float, ...], list[FrozenTrial]] = {}
        for trial in self.well:
            found.setdefault(self._key(trial.params), []).append(trial)
        return found

    @cached_property
    def _unbiased(self) -> Mapping[tuple[float, ...], Sequence[FrozenTrial]]:
        """The runs by point that no choice was made by, without those that fell off a cliff."""
        options = self.study.user_attrs[IDENTITY]["proposals"]["options"]
        cliff = options.get("cliff", Rules.cliff)
        found = {}
        for key, runs in self._by_point.items():
            fresh = [trial for trial in runs if not self.chosen_for(trial)]
            near = near_lowest({trial.number: _value(trial) for trial in fresh}, cliff)
            found[key] = [trial for trial in fresh if trial.number in near]
        return found

    def chosen_for(self, trial: FrozenTrial) -> bool:
        """Whether `trial` is the run that its point was kept for, and so its loss too low."""
        return not replicate_of(trial) and any(self._key(trial.params))

    @cached_property
    def noise(self) -> tuple[float, int]:
        """Standard deviation of a run over seeds, pooled over points, and its degrees of freedom.

        NaN and 0 where no point has two unbiased runs.
        """
        return pooled_deviation([list(map(_value, runs)) for runs in self._unbiased.values()])

    def estimate(self, point: Mapping[str, float]) -> Estimate:
        """The loss at `point`, by all that the study knows of it."""
        key = self._key(point)
        runs = self._unbiased.get(key, ())
        biased = not runs and key in self._by_point
        losses = [_value(run) for run in (self._by_point[key] if biased else runs)]
        mean = fmean(losses) if losses else math.nan
        return Estimate(mean, len(losses), biased, *self.noise)

    def gain(self, point: Mapping[str, float]) -> Gain | None:
        """How far `point` is below the start, in runs it was not chosen by; None without any."""
        seeds = SeedNoise()
        for key, runs in self._unbiased.items():
            seeds.replace(key, {replicate_of(run): _value(run) for run in runs})
        start, key = self._key({}), self._key(point)
        if not (self._unbiased.get(start) and self._unbiased.get(key)):
            return None
        found = seeds.gain(key, over=start)
        return found if math.isfinite(found.standard_error) else None

    @property
    def challenges(self) -> int:
        """Points other than the start that were run again, to tell whether they are better."""
        start = self._key({})
        return sum(bool(runs) for key, runs in self._unbiased.items() if key != start)

    def diverged(self, point: Mapping[str, float]) -> int:
        """How many runs of `point` diverged."""
        key, well = self._key(point), {trial.number for trial in self.well}
        own = (trial for trial in self.finished if self._key(trial.params) == key)
        return sum(trial.number not in well for trial in own)

    @property
    def start(self) -> Estimate:
        """The loss of the base run."""
        return self.estimate({})

    @cached_property
    def held(self) -> Sequence[Held]:
        """The best points one after the other; empty before the first trial ended well."""
        found: list[Held] = []
        for since, point in self._best_after_each():
            if not found or self._key(found[-1].point) != self._key(point):
                found.append(Held(since, point))
        return found

    def best_after(self, trials: int) -> Mapping[str, float] | None:
        """The point that was held for the best after so many trials; None before the first."""
        held = [each.point for each in self.held if each.since <= trials]
        return held[-1] if held else None

    def _best_after_each(self) -> Iterator[tuple[int, Mapping[str, float]]]:
        """(trials begun, best point), trial by trial in the order they were begun."""
        replayed = optuna.create_study(sampler=self._sampler())
        for trial in self.trials:
            replayed.add_trial(trial)
            best = incumbent(replayed) if trial.state == TrialState.COMPLETE else None
            if best is not None:
                yield self.places[trial.number], best.params

    def _sampler(self) -> optuna.samplers.BaseSampler:
        """Ours where it is the study's, since it says which point it holds; any other will do."""
        proposals = self.study.user_attrs[IDENTITY]["proposals"]
        if proposals["sampler"] != "trust_region":
            return optuna.samplers.RandomSampler()
        return make_sampler(
            "trust_region",
            seed=proposals["seed"],
            space=self.space.distributions(),
            **self.space.trust_region(),
            settings=proposals["options"],
        )

    def _key(self, point: Mapping[str, float]) -> tuple[float, ...]:
        return tuple(point.get(name, 0.0) for name in self.space.names)


def _value(trial: FrozenTrial) -> float:
    assert trial.value is not None, "a completed trial"
    return trial.value
