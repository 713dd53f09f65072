"""Trust-region random search as an Optuna sampler: any study, any storage, any number of workers.

    study = optuna.create_study(sampler=TrustRegionSampler(seed=1))

What the search decides, and why, is in `trust_state`; this module is what Optuna sees of it. All
that is remembered is in the trials themselves (their parameters, their values and one system
attribute), so a killed search goes on where it was.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial

from megatron_completedp.errors import ConfigError
from megatron_completedp.search.attributes import FIXED, REPLICATE, TAG
from megatron_completedp.search.axes import Axis, axes_of
from megatron_completedp.search.moves import child, params_of, step
from megatron_completedp.search.trust_rules import START, Rules
from megatron_completedp.search.trust_state import State, fold
from megatron_completedp.search.trust_trials import Reader, Trials

_LOG = logging.getLogger(__name__)


#: The rules that can be set; the sampler works the other two out.
_RULES = {
    item.name: item for item in dataclasses.fields(Rules) if item.name not in ("floor", "ceiling")
}


class TrustRegionSampler(optuna.samplers.BaseSampler):
    """Random search in a box around the incumbent, for one objective, minimized or maximized.

    Float parameters are searched, those with `log=True` in their natural logarithm. A parameter of
    another kind is drawn at random for every new point (a warning says so once); the runs that
    repeat a point repeat its draw.

    An objective on which runs of one point differ by a seed should take the seed from
    `trial.user_attrs["replicate"]`, 0 for the first run of a point. It reports a diverged run as
    inf, or as any value with the user attribute `diverged` set; Optuna fails a trial that returns
    NaN, and a trial that failed for good ranks last like a diverged one.

    A trial that was enqueued, added, or proposed by another sampler takes part like a child, except
    that it says nothing about the size of the region. What an enqueued one leaves open is drawn as
    for a child.

    Args:
        seed: of the proposals. Workers of one study share it: a proposal is drawn by (seed, slot).
        space: the float parameters, if known beforehand. Without it they are the ones that all
            completed trials have in common, and every trial until the first completes runs the
            start.
        start: where to begin, by parameter; one not named begins at 0 if it is linear and 0 within
            its bounds (no change, for log multipliers), else in the middle of its bounds.
        radius: start radius of each coordinate, or one for all; in natural logarithms for a
            parameter with `log=True` and for log multipliers. 0.5 is a factor of 1.65.
        kinds: of each coordinate, for the linear model: it learns from the coordinates of a kind
            together how much they matter. By default all are of one.
        floor: least radius of the widest coordinate, in the same unit; 0.02 is 2 %.
        subset: share of the coordinates that a child moves, at least one. A model learns most from
            children that move all. Without a linear step take a quarter: a child that moves few can
            be better in those without paying for the others.
        **rules: fields of `trust_state.Rules`, except its floor and ceiling.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        space: Mapping[str, FloatDistribution] | None = None,
        start: Mapping[str, float] | None = None,
        radius: float | Mapping[str, float] = 0.5,
        kinds: Mapping[str, str] | None = None,
        floor: float = 0.02,
        subset: float = 1.0,
        **rules: Any,
    ) -> None:
        """See the class. Raises ConfigError for a value outside its range."""
        if unknown := sorted(set(rules) - set(_RULES)):
            message = f"trust region: no setting {', '.join(unknown)}"
            raise ConfigError(f"{message}; there are {', '.join(sorted(_RULES))}")
        for item in _RULES.values():
            value = rules.get(item.name, item.default)
            if item.type == "int" and not isinstance(value, int):
                raise ConfigError(f"trust region: {item.name}={value!r} must be a whole number")
        if not 0 < subset <= 1:
            raise ConfigError(f"trust region: subset={subset!r} must be in (0, 1]")
        if not floor > 0:
            raise ConfigError(f"trust region: floor={floor!r} must be above 0")
        if seed < 0:
            raise ConfigError(f"trust region: seed={seed!r} must be at least 0")
        self._seed = seed
        self._space = None if space is None else dict(space)
        self._start = dict(start or {})
        self._radius = radius
        self._kinds = dict(kinds or {})
        self._floor = floor
        self._subset = subset
        self._rules = Rules(**rules)
        self._axes = None if space is None else self.axes(space)
        self._reader = Reader()
        self._common = optuna.search_space.IntersectionSearchSpace()
        self._warned: set[str] = set()

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The settings that decide what is proposed, by name, where none are given."""
        rules = {name: item.default for name, item in _RULES.items()}
        own = inspect.signature(cls).parameters
        return {**rules, **{name: own[name].default for name in ("floor", "subset")}}

    def state(self, study: optuna.Study) -> State:
        """What the study's finished trials say."""
        axes = self._searched(self._floats(study))
        return fold(self._reader.read(study, axes).runs, self._limits(axes))

    def params(self, study: optuna.Study, point: int) -> dict[str, float]:
        """The float parameters of `point`, e.g. of `state(study).incumbent`."""
        axes = self._searched(self._floats(study))
        return params_of(axes, self._reader.read(study, axes), point)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """The float parameters, as far as they are known."""
        self._raise_error_if_multi_objective(study)
        axes = self._searched(self._floats(study))
        return {name: axis.distribution for name, axis in axes.items()}

    def sample_relative(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        """The parameters of the trial's point; writes down in the trial what it runs."""
        axes = self._searched(search_space)
        trials = self._reader.read(study, axes, without=trial.number)
        # A retry that its predecessor already gave a point runs that point.
        tag = trial.system_attrs.get(TAG)
        if tag is None:
            given = bool(trial.system_attrs.get(FIXED))
            # A given point is its own, drawn from no region: it says nothing about one.
            own = {"point": trials.own, REPLICATE: 0}
            tag = own if given else self._tag(trials, axes)
            # The tag last: a worker that dies in between leaves a trial that is tagged anew, not
            # one that says nowhere which run of its point it is.
            study._storage.set_trial_user_attr(trial._trial_id, REPLICATE, tag[REPLICATE])
            study._storage.set_trial_system_attr(trial._trial_id, TAG, tag)
        # The objective's trial is read before its sampler runs, and must see these too.
        trial.system_attrs[TAG] = tag
        trial.user_attrs[REPLICATE] = tag[REPLICATE]
        if tag["point"] != trials.own:
            if tag["point"] < START and trials.trial_of(tag["point"]) is None:
                return step(axes, trials, tag, rules=self._rules, subset=self._subset)
            return params_of(axes, trials, tag["point"])
        if "centre" not in tag:  # what it was not given
            state = fold(trials.runs, self._limits(axes))
            tag = {**tag, "centre": state.centre, "scale": state.scale}
        return child(axes, trials, tag, seed=self._seed, subset=self._subset)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """A parameter that is not searched, or not yet known to be: drawn by (seed, point)."""
        point = study._storage.get_trial(trial._trial_id).system_attrs[TAG]["point"]
        first = point == START or bool(trial.system_attrs.get(FIXED))
        if isinstance(param_distribution, FloatDistribution) and first:
            axis = self.axes({param_name: param_distribution})[param_name]
            return axis.value(axis.start)
        if param_name not in self._warned:
            self._warned.add(param_name)
            _LOG.warning(
                "%s is no float parameter that all trials share: it is drawn at random", param_name
            )
        name = [point + 1] if point >= START else [0, START - point]
        key = [self._seed, *name, zlib.crc32(param_name.encode())]
        seed = int(np.random.SeedSequence(key).generate_state(1)[0])
        random = optuna.samplers.RandomSampler(seed)
        return random.sample_independent(study, trial, param_name, param_distribution)

    def _tag(self, trials: Trials, axes: Mapping[str, Axis]) -> dict[str, Any]:
        """What a trial is to run, given the others."""
        if not axes:
            repeats = [run.replicate for run in trials.runs if run.point == START]
            return {"point": START, REPLICATE: max(repeats, default=-1) + 1}
        state = fold(trials.runs, self._limits(axes))
        taken = {(run.point, run.replicate) for run in trials.runs}
        for point, replicate in state.wanted:
            if (point, replicate) not in taken:
                wanted: dict[str, Any] = {"point": point, REPLICATE: replicate}
                if point < START and trials.trial_of(point) is None:
                    wanted |= {"centre": [state.incumbent], "scale": state.scale}
                return wanted
        # Also while others run what is wanted: no worker waits, and every child counts.
        centre = {"centre": list(state.centre), "scale": state.scale}
        return {"point": trials.own, REPLICATE: 0, **centre}

    def axes(self, space: Mapping[str, BaseDistribution]) -> dict[str, Axis]:
        """The float parameters of `space` that can vary, as they are searched."""
        return axes_of(
            space, start=self._start, radius=self._radius, kinds=self._kinds, floor=self._floor
        )

    def _searched(self, space: Mapping[str, BaseDistribution]) -> dict[str, Axis]:
        return self.axes(space) if self._axes is None else self._axes

    def _floats(self, study: optuna.Study) -> Mapping[str, BaseDistribution]:
        """The parameters that are known to be there."""
        return self._common.calculate(study) if self._space is None else self._space

    def _limits(self, axes: Mapping[str, Axis]) -> Rules:
        """The rules with the scale's limits, which depend on the space."""
        if not axes:
            return self._rules
        widest = max(axis.radius for axis in axes.values())
        span = max((axis.high - axis.low) / axis.radius for axis in axes.values())
        return dataclasses.replace(
            self._rules, floor=min(1.0, self._floor / widest), ceiling=max(1.0, span)
        )
