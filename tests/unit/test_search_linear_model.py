"""The step of the trust region: the linear model, the fold that asks for it, and what it gains."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest

optuna = pytest.importorskip("optuna")

from optuna.distributions import FloatDistribution  # noqa: E402
from optuna.trial import create_trial  # noqa: E402

from megatron_completedp.search import linear_model  # noqa: E402
from megatron_completedp.search.attributes import REPLICATE, TAG  # noqa: E402
from megatron_completedp.search.moves import STRIDE, direction  # noqa: E402
from megatron_completedp.search.trust_region import TrustRegionSampler  # noqa: E402
from megatron_completedp.search.trust_rules import START, Rules, step_after  # noqa: E402
from megatron_completedp.search.trust_state import Run, fold  # noqa: E402
from megatron_completedp.search.trust_trials import Trials  # noqa: E402


def descent(
    points: np.ndarray, losses: np.ndarray, groups: np.ndarray, kinds: np.ndarray | None = None
) -> np.ndarray:
    """With all coordinates of one kind unless `kinds` are given."""
    one = np.zeros(points.shape[1], dtype=np.int64)
    return linear_model.descent(points, losses, groups, one if kinds is None else kinds)


def cosine(direction: np.ndarray, slope: np.ndarray) -> float:
    return float(-direction @ slope / np.linalg.norm(slope))


def test_the_direction_is_that_of_steepest_descent() -> None:
    generator = np.random.default_rng(0)
    points, slope = generator.uniform(-1, 1, (60, 20)), generator.normal(size=20)
    exact = descent(points, points @ slope, np.zeros(60, dtype=np.int64))
    assert np.linalg.norm(exact) == pytest.approx(1)
    assert cosine(exact, slope) > 0.99
    # Noise as large as what the slope does: still downhill.
    noisy = points @ slope + generator.normal(size=60) * (points @ slope).std()
    assert cosine(descent(points, noisy, np.zeros(60, dtype=np.int64)), slope) > 0.6


@pytest.mark.parametrize(("prior", "least"), [(0.0, 0.95), (linear_model._PRIOR, 0.9)])
def test_kinds_that_matter_are_told_from_those_that_do_not(
    prior: float, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where 8 of 64 coordinates matter, knowing them for a kind finds more of the slope.

    The belief that all kinds matter alike is wrong here, and costs a little.
    """
    monkeypatch.setattr(linear_model, "_PRIOR", prior)
    told, untold, mistold = [], [], []
    for seed in range(4):
        generator = np.random.default_rng(seed)
        points, slope = generator.uniform(-1, 1, (48, 64)), np.zeros(64)
        slope[:8] = generator.normal(size=8)
        losses = points @ slope + 0.5 * generator.normal(size=48)
        kinds, groups = np.arange(64) // 8, np.zeros(48, dtype=np.int64)
        told.append(cosine(descent(points, losses, groups, kinds), slope))
        untold.append(cosine(descent(points, losses, groups), slope))
        # Negative control: kinds that mean nothing do not tell.
        shuffled = generator.permutation(kinds)
        mistold.append(cosine(descent(points, losses, groups, shuffled), slope))
    assert min(told) > least
    assert np.mean(untold) < 0.8
    assert np.mean(mistold) < np.mean(told) - 0.02


def test_a_few_noisy_runs_do_not_dismiss_whole_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all kinds matter alike, 24 runs look as if half of them did not matter at all."""
    found: dict[float, list[float]] = {linear_model._PRIOR: [], 0.0: []}
    for seed in range(40):
        generator = np.random.default_rng(seed)
        points, slope = generator.uniform(-1, 1, (24, 70)), generator.normal(size=70)
        losses = points @ slope + 5.0 * generator.normal(size=24)
        kinds, groups = np.arange(70) // 10, np.zeros(24, dtype=np.int64)
        for prior, cosines in found.items():
            monkeypatch.setattr(linear_model, "_PRIOR", prior)
            cosines.append(cosine(descent(points, losses, groups, kinds), slope))
    kept, dismissed = (float(np.mean(cosines)) for cosines in found.values())
    assert kept > dismissed + 0.03, (kept, dismissed)


def test_what_a_group_of_runs_has_in_common_is_no_slope() -> None:
    generator = np.random.default_rng(1)
    points, slope = generator.uniform(-1, 1, (80, 10)), generator.normal(size=10)
    groups = np.repeat([0, 1], 40)
    points[groups == 1] += 1.0  # drawn around another centre, where everything is worse
    losses = points @ slope + 50.0 * groups
    assert cosine(descent(points, losses, groups), slope) > 0.98
    # Negative control: as one group, the step between the groups passes for a slope.
    assert cosine(descent(points, losses, np.zeros(80, dtype=np.int64)), slope) < 0.5


def test_a_cliff_on_one_side_is_cut_to_what_the_losses_say_otherwise() -> None:
    generator = np.random.default_rng(2)
    points, slope = generator.uniform(-1, 1, (60, 10)), generator.normal(size=10) * 0.01
    losses = points @ slope
    losses[[3, 30]] += 0.9  # just short of what counts as a cliff
    assert cosine(descent(points, losses, np.zeros(60, dtype=np.int64)), slope) > 0.9


def test_without_any_slope_there_is_no_direction() -> None:
    points, one = np.random.default_rng(3).uniform(-1, 1, (6, 4)), np.zeros(6, dtype=np.int64)
    assert not descent(points, np.full(6, 4.2), one).any()
    assert not descent(points, np.arange(6.0), np.arange(6)).any()  # each alone in its group
    square = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    bowl = np.array([1.0, 1.0, 2.0, 2.0])  # the losses differ, their slopes are exactly 0
    assert not descent(square, bowl, np.zeros(4, dtype=np.int64)).any()


def child(slot: int, loss: float) -> Run:
    return Run(slot, slot, 0, loss, (START,), 1.0)


def test_after_a_round_a_step_below_the_incumbent_challenges_else_the_best_child() -> None:
    rules = Rules(round_size=2, start_replicates=1, confirm=1, guard=0.0)
    runs = [Run(0, START, 0, 1.0), child(1, 0.95), child(2, 1.1)]
    assert fold(runs[:2], rules).wanted == ()
    step = step_after(0)
    assert fold(runs, rules).wanted == ((step, 0),)
    # One above the incumbent leaves the challenge to the child, on fresh seeds; one that is only
    # above the child does not, for the child was the luckiest of several.
    assert fold([*runs, Run(3, step, 0, 1.01)], rules).wanted == ((1, 1), (START, 1))
    better = [*runs, Run(3, step, 0, 0.97)]
    assert fold(better, rules).wanted == ((step, 1), (START, 1))
    won = fold([*better, Run(4, step, 1, 0.9), Run(5, START, 1, 1.0)], rules)
    assert (won.incumbent, won.centre, won.loss) == (step, (step,), 0.9)
    lost = fold([*better, Run(4, step, 1, 1.0), Run(5, START, 1, 0.9)], rules)
    assert (lost.incumbent, lost.rounds[0].challenger) == (START, step)
    # What something else proposed challenges if it is below the step.
    given = [runs[0], Run(1, 1, 0, 0.95), runs[2], Run(3, step, 0, 0.97)]
    assert fold(given, rules).wanted == ((1, 1), (START, 1))
    # A step that diverged is no challenger.
    assert fold([*runs, Run(3, step, 0, math.inf)], rules).wanted[0] == (1, 1)


def tilted(params: dict[str, Any], replicate: int, noise: float = 0.01) -> float:
    """40 coordinates of which each matters little: 0.4 lower at best, 5 % of it for each seed."""
    loss = sum(0.005 * (-1) ** i * x + 0.00125 * x * x / 2 for i, x in enumerate(params.values()))
    return loss + random.Random(f"{params} {replicate}").gauss(0, noise)


def search(trials: int, seed: int, **rules: Any) -> tuple[Any, TrustRegionSampler]:
    space = {f"x{i}": FloatDistribution(-8, 8) for i in range(40)}
    sampler = TrustRegionSampler(seed=seed, space=space, radius=1.0, **rules)
    study = optuna.create_study(sampler=sampler)
    for _ in range(trials):
        trial = study.ask(space)
        study.tell(trial, tilted(trial.params, trial.user_attrs[REPLICATE]))
    return study, sampler


def test_steps_gain_what_single_children_cannot() -> None:
    """Many coordinates of little weight each, and noise: the case that a search by module is."""
    found: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(4):
        for linear_step, rules in ((True, {}), (False, {"round_size": 8, "subset": 0.25})):
            study, sampler = search(140, seed, linear_step=linear_step, **rules)
            incumbent = sampler.params(study, sampler.state(study).incumbent)
            found[linear_step].append(tilted(incumbent, 0, noise=0.0))
    assert np.mean(found[True]) < 1.5 * np.mean(found[False]) < 0


def test_a_step_is_the_same_whoever_takes_it() -> None:
    steps = []
    for _ in range(2):
        study, sampler = search(19, 7)  # three runs of the start, a round of 16
        assert sampler.state(study).wanted == ((step_after(0), 0),)
        # Another worker than the one that saw the round.
        study.sampler = TrustRegionSampler(seed=7, space=sampler._space, radius=1.0)
        steps.append(study.ask(sampler._space))
        # While it runs, nobody else takes it.
        other = study.ask(sampler._space)
        assert study.trials[other.number].system_attrs[TAG]["point"] == other.number
    first, second = (step.params for step in steps)
    assert first == second
    assert first != search(19, 8)[0].ask(sampler._space).params
    # No coordinate leaves the region, and the step is somewhat longer than a child's.
    moved, child = np.array(list(first.values())), math.sqrt(40 / 3)
    assert abs(moved).max() <= 1.0
    assert child < np.linalg.norm(moved) <= STRIDE * child + 1e-9


def test_children_of_a_wider_region_are_compared_among_themselves() -> None:
    """Curvature lifts all losses of a wide round: between regions that is no slope."""
    generator = np.random.default_rng(5)
    points, slope = generator.uniform(-1, 1, (96, 20)), generator.normal(size=20) * 0.02
    scales = np.repeat([1.0, 1.5, 2.25, 3.4], 24)
    points *= scales[:, None]
    losses = points @ slope + 0.01 * (points**2).sum(axis=1)
    by_region = cosine(descent(points, losses, np.repeat([0, 1, 2, 3], 24)), slope)
    as_one = cosine(descent(points, losses, np.zeros(96, dtype=np.int64)), slope)
    assert by_region > as_one + 0.1


AXES = {name: FloatDistribution(-100, 100) for name in ("a", "b")}


def slope_seen(
    children: list[tuple[dict[str, float], float, float]], near: float = 10.0
) -> np.ndarray:
    """The direction that the sampler sees from the origin in children (point, loss, scale)."""
    trials = {
        slot: create_trial(
            params=point, distributions={name: AXES[name] for name in point}, value=loss
        )
        for slot, (point, loss, _) in enumerate(children)
    }
    runs = [
        Run(slot, slot, 0, loss, (START,), scale) for slot, (_, loss, scale) in enumerate(children)
    ]
    axes = TrustRegionSampler(space=AXES, radius=1.0).axes(AXES)
    origin, held = dict.fromkeys(AXES, 0.0), Trials(runs, trials, len(runs))
    return direction(axes, held, origin, count=len(runs), scale=1.0, near=near, cliff=1.0)


def test_the_sampler_learns_by_kind() -> None:
    """From 40 children around the origin, with 8 of 48 coordinates that matter."""
    generator = np.random.default_rng(0)
    space = {f"x{i:02d}": FloatDistribution(-9, 9) for i in range(48)}
    points, slope = generator.uniform(-1, 1, (40, 48)), np.r_[generator.normal(size=8), [0.0] * 40]
    losses = 0.01 * (points @ slope + 0.5 * generator.normal(size=40))
    trials, runs = {}, []
    for slot, (at, loss) in enumerate(zip(points.tolist(), losses.tolist(), strict=True)):
        params = dict(zip(space, at, strict=True))
        trials[slot] = create_trial(params=params, distributions=space, value=loss)
        runs.append(Run(slot, slot, 0, loss, (START,), 1.0))
    found = []
    for kinds in ({name: str(i // 8) for i, name in enumerate(space)}, None):
        axes = TrustRegionSampler(space=space, radius=1.0, kinds=kinds).axes(space)
        held, origin = Trials(runs, trials, 40), dict.fromkeys(space, 0.0)
        down = direction(axes, held, origin, count=40, scale=1.0, near=99.0, cliff=1.0)
        found.append(cosine(down, slope))
    told, untold = found
    assert told > 0.9 > untold + 0.1


def point(a: float, b: float) -> dict[str, float]:
    return {"a": a, "b": b}


#: Four children at scale 1, whose losses fall with a.
CROSS = [
    (point(1, 0), -0.05, 1.0),
    (point(-1, 0), 0.05, 1.0),
    (point(0, 1), 0.0, 1.0),
    (point(0, -1), 0.0, 1.0),
]


def test_the_sampler_keeps_the_rounds_of_a_centre_apart_by_their_scale() -> None:
    # Curvature lifts the wide round by 0.5, and it happens to lie where a is positive.
    wide = [(point(2, 1), 0.40), (point(3, -1), 0.35), (point(2.5, 0), 0.375)]
    assert slope_seen(CROSS)[0] > 0.99
    assert slope_seen(CROSS + [(*child, 3.0) for child in wide])[0] > 0.99
    # Negative control: as one round, that reads as a slope the other way.
    assert slope_seen(CROSS + [(*child, 1.0) for child in wide])[0] < 0


def test_the_sampler_leaves_out_children_far_from_the_incumbent() -> None:
    far = [(point(20, 0), 0.1, 2.0), (point(22, 0), 0.5, 2.0), (point(21, 1), 0.3, 2.0)]
    assert slope_seen(CROSS + far, near=2.5)[0] > 0.99
    assert slope_seen(CROSS + far, near=30)[0] < 0  # negative control


def test_a_child_without_some_parameter_is_left_out() -> None:
    assert slope_seen([*CROSS, ({"a": 1.0}, 0.9, 1.0)])[0] > 0.99
    assert not slope_seen([({"a": 1.0}, 0.9, 1.0)]).any()
