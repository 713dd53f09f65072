"""Where a trust region's children and steps lie."""

from __future__ import annotations

import math
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import numpy as np

from megatron_completedp.search.axes import Axis, vector
from megatron_completedp.search.linear_model import Floats, descent
from megatron_completedp.search.trust_rules import START, Rules
from megatron_completedp.search.trust_trials import Trials

Axes = Mapping[str, Axis]
Params = dict[str, float]
#: What a trial's system attribute says that it runs: see `TrustRegionSampler`.
Tag = Mapping[str, Any]

#: Length of a step in those of a typical child: the model's direction is surer than any child's,
#: and a step that went too far costs one run.
STRIDE = 1.5

#: Children further from the incumbent than so many times a typical one say nothing about its slope.
LOCAL = 2.5


def child(axes: Axes, trials: Trials, tag: Tag, *, seed: int, subset: float) -> Params:
    """Centre + radius * u on a random subset of the coordinates, u uniform in [-1, 1].

    Drawn by (seed, slot). Uniform and not normal, so that "never outside the region" has no
    exceptions: what lies beyond a cliff is far worse than what a longer step could win.
    """
    points = [params_of(axes, trials, point) for point in tag["centre"]]
    generator = np.random.default_rng([seed, trials.own])
    parts = generator.uniform(-1, 1, len(axes))
    still = generator.permutation(len(axes))[_moved(axes, subset) :]
    parts[still] = 0
    found = {}
    for (name, axis), part in zip(axes.items(), parts.tolist(), strict=True):
        values = [axis.coordinate(point[name]) for point in points]
        centre = sum(values) / len(values)
        found[name] = axis.value(centre + axis.reach(tag["scale"]) * part)
    return found


def step(axes: Axes, trials: Trials, tag: Tag, *, rules: Rules, subset: float) -> Params:
    """From the incumbent down a linear model of the children near it, in their region.

    STRIDE times as long as a typical child's step, which is sqrt(coordinates moved / 3) in radii;
    each coordinate is clipped to the region.
    """
    (incumbent,) = tag["centre"]
    start, scale = params_of(axes, trials, incumbent), tag["scale"]
    length = math.sqrt(_moved(axes, subset) / 3)
    # Step k follows k + 1 rounds.
    children = (START - tag["point"]) * rules.round_size
    down = direction(
        axes, trials, start, count=children, scale=scale, near=LOCAL * length, cliff=rules.cliff
    )
    parts = (down * STRIDE * length).clip(-1, 1)
    return {
        name: axis.value(axis.coordinate(start[name]) + axis.reach(scale) * part)
        for (name, axis), part in zip(axes.items(), parts.tolist(), strict=True)
    }


def direction(
    axes: Axes,
    trials: Trials,
    start: Mapping[str, float],
    *,
    count: int,
    scale: float,
    near: float,
    cliff: float,
) -> Floats:
    """Where the losses fall among those of the first `count` children within `near` of `start`.

    In units of the region at `scale`; zeros if nowhere. Without children more than `cliff` above
    the lowest, that something else proposed, or that lack one of `axes`.
    """
    children = [run for run in trials.runs if run.point == run.slot]
    reach = np.array([axis.reach(scale) for axis in axes.values()])
    here = vector(axes, start)
    drawn = []
    for run in sorted(children, key=attrgetter("slot"))[:count]:
        params = trials.by_slot[run.slot].params
        if run.loss is None or run.centre is None or not axes.keys() <= params.keys():
            continue
        point = (vector(axes, params) - here) / reach
        if math.isfinite(run.loss) and np.linalg.norm(point) <= near:
            drawn.append((run.loss, (run.centre, run.scale), point))
    lowest = min((loss for loss, *_ in drawn), default=math.inf)
    drawn = [each for each in drawn if each[0] <= lowest + cliff]
    if not drawn:
        return np.zeros(len(axes))
    regions = sorted({region for _, region, _ in drawn})
    kinds = sorted({axis.kind for axis in axes.values()})
    return descent(
        np.array([point for *_, point in drawn]),
        np.array([loss for loss, *_ in drawn]),
        np.array([regions.index(region) for _, region, _ in drawn]),
        np.array([kinds.index(axis.kind) for axis in axes.values()]),
    )


def params_of(axes: Axes, trials: Trials, point: int) -> Params:
    """The parameters of `point`, which is the start or one that a trial was asked to run."""
    if point == START:
        return {name: axis.value(axis.start) for name, axis in axes.items()}
    trial = trials.trial_of(point)
    assert trial is not None, f"no trial was asked to run point {point}"
    return {name: trial.params[name] for name in axes}


def _moved(axes: Axes, subset: float) -> int:
    """How many coordinates a child moves."""
    return max(1, round(subset * len(axes)))
