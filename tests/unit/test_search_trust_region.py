"""The trust-region sampler in Optuna studies: any storage, any number of workers."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

optuna = pytest.importorskip("optuna")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from optuna.distributions import FloatDistribution  # noqa: E402
from optuna.trial import FrozenTrial, TrialState, create_trial  # noqa: E402

from megatron_completedp.errors import ConfigError  # noqa: E402
from megatron_completedp.search.attributes import REPLICATE, TAG  # noqa: E402
from megatron_completedp.search.surrogate import synthetic  # noqa: E402
from megatron_completedp.search.trust_region import TrustRegionSampler  # noqa: E402
from megatron_completedp.search.trust_rules import START  # noqa: E402
from megatron_completedp.search.trust_trials import Reader  # noqa: E402

#: One of each kind: log multipliers with and without the base inside, a logarithm, a step.
SPACE = {
    "a": FloatDistribution(-2.3, 2.3),
    "b": FloatDistribution(0.1, 2.0),
    "lr": FloatDistribution(1e-4, 1e-1, log=True),
    "step": FloatDistribution(0.0, 3.0, step=0.25),
}


@pytest.fixture(autouse=True)
def _silent() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(before)


def noisy(params: dict[str, Any], replicate: int) -> float:
    """A quadratic whose noise is a function of the point and its replicate, as with real seeds."""
    offset = math.log(params["lr"] / 1e-2)
    loss = (params["a"] - 1) ** 2 + offset**2 + 0.1 * (params["b"] - 1) ** 2
    return loss + random.Random(f"{params} {replicate}").gauss(0, 0.01)


def step(study: Any, space: dict[str, Any] = SPACE) -> None:
    trial = study.ask(space)
    study.tell(trial, noisy(trial.params, trial.user_attrs[REPLICATE]))


def points(study: Any) -> list[dict[str, float]]:
    return [trial.params for trial in study.trials if trial.state == TrialState.COMPLETE]


def check_region(study: Any, sampler: TrustRegionSampler) -> int:
    """Every proposal so far is in the box it was drawn from; returns how many were drawn."""
    by_slot = Reader().read(study, SPACE).by_slot
    axes, drawn = sampler.axes(SPACE), 0
    starts = {name: axis.value(axis.start) for name, axis in axes.items()}

    def first_of(point: int) -> dict[str, Any]:
        """Parameters of the first trial that ran a child or a step."""
        tags = ((by_slot[slot], by_slot[slot].system_attrs[TAG]) for slot in sorted(by_slot))
        return next(trial.params for trial, tag in tags if tag["point"] == point)

    for slot, trial in by_slot.items():
        tag = trial.system_attrs[TAG]
        if tag["point"] != slot and "centre" not in tag:
            of = starts if tag["point"] == START else first_of(tag["point"])
            assert trial.params == of
            continue
        drawn += 1  # a child or a step
        for name, axis in axes.items():
            assert axis.distribution.low <= trial.params[name] <= axis.distribution.high
            centre = [
                axis.coordinate((starts if of == START else first_of(of))[name])
                for of in tag["centre"]
            ]
            radius = max(tag["scale"] * axis.radius, 0.02)
            # Half a step of rounding, or that of a logarithm and back.
            slack = 0.125 if name == "step" else 1e-12
            distance = abs(axis.coordinate(trial.params[name]) - sum(centre) / len(centre))
            assert distance <= radius + slack
    return drawn


def test_a_noisy_quadratic_is_brought_down() -> None:
    """Losses below 0.05 from 1 + 0.8 at the start: radius 0.5 must cross more than 1 nat."""
    for seed in range(3):
        sampler = TrustRegionSampler(seed=seed, space=SPACE, round_size=8, start={"lr": 4e-3})
        study = optuna.create_study(sampler=sampler)
        for _ in range(150):
            step(study)
        assert study.trials[0].params["lr"] == pytest.approx(4e-3)
        assert sampler.state(study).loss < 0.05
        assert check_region(study, sampler) > 80


def test_a_maximized_study_is_the_same_search_upside_down() -> None:
    studies = {}
    for direction, sign in (("minimize", 1), ("maximize", -1)):
        study = optuna.create_study(direction=direction, sampler=TrustRegionSampler(space=SPACE))
        for _ in range(40):
            trial = study.ask(SPACE)
            study.tell(trial, sign * noisy(trial.params, trial.user_attrs[REPLICATE]))
        studies[direction] = points(study)
    assert studies["minimize"] == studies["maximize"]


@given(st.integers(0, 1000), st.integers(2, 12), st.booleans(), st.booleans())
@settings(max_examples=10, deadline=None)
def test_any_number_of_workers_stay_in_the_region_and_lose_no_round(
    seed: int, workers: int, recentre: bool, linear_step: bool
) -> None:
    sampler = TrustRegionSampler(
        seed=seed, space=SPACE, round_size=4, recentre=recentre, linear_step=linear_step
    )
    study = optuna.create_study(sampler=sampler)
    generator, running = random.Random(seed), []
    for _ in range(80):
        if len(running) < workers and generator.random() < 0.6:
            running.append(study.ask(SPACE))
        elif running:
            trial = running.pop(generator.randrange(len(running)))
            study.tell(trial, noisy(trial.params, trial.user_attrs[REPLICATE]))
    for trial in running:
        study.tell(trial, noisy(trial.params, trial.user_attrs[REPLICATE]))
    check_region(study, sampler)
    # No name is run twice, and every complete round is decided unless one waits for runs.
    tags = [trial.system_attrs[TAG] for trial in study.trials]
    names = [(tag["point"], tag[REPLICATE]) for tag in tags]
    assert len(set(names)) == len(names)
    state = sampler.state(study)
    rounds = sum("centre" in tag and tag["point"] >= 0 for tag in tags) // 4
    assert len(state.rounds) == rounds or state.wanted


def test_the_state_is_that_of_the_trials_and_not_of_the_sampler(tmp_path: Path) -> None:
    """One that lived through the study, a fresh one, and one stopped after every trial."""
    lived = TrustRegionSampler(seed=3, space=SPACE, round_size=4)
    study = optuna.create_study(sampler=lived)
    for _ in range(30):
        step(study)
    fresh = TrustRegionSampler(seed=3, space=SPACE, round_size=4)
    assert fresh.state(study) == lived.state(study)
    assert lived.params(study, lived.state(study).incumbent) == fresh.params(
        study, fresh.state(study).incumbent
    )
    url = f"sqlite:///{tmp_path / 'study.db'}"
    for _ in range(30):
        sampler = TrustRegionSampler(seed=3, space=SPACE, round_size=4)
        step(optuna.create_study(storage=url, study_name="s", load_if_exists=True, sampler=sampler))
    stopped = optuna.load_study(storage=url, study_name="s", sampler=fresh)
    assert points(stopped) == points(study)
    assert fresh.state(stopped) == lived.state(study)

    # Negative control: another seed is another sequence.
    other = optuna.create_study(sampler=TrustRegionSampler(seed=4, space=SPACE, round_size=4))
    for _ in range(30):
        step(other)
    assert points(other)[:3] == points(study)[:3]  # runs of the start
    assert points(other)[3:] != points(study)[3:]


def test_one_sampler_used_in_two_studies_does_not_mix_them() -> None:
    sampler = TrustRegionSampler(space=SPACE, round_size=4)
    first, second = (optuna.create_study(sampler=sampler) for _ in range(2))
    for _ in range(25):
        step(first)
        trial = second.ask(SPACE)
        second.tell(trial, -noisy(trial.params, 0))
    for study in (first, second):
        assert sampler.state(study) == TrustRegionSampler(space=SPACE, round_size=4).state(study)


@pytest.mark.parametrize("suggested", [0, 2, 4])
def test_a_killed_worker_changes_nothing_but_trial_numbers(suggested: int) -> None:
    """Killed after some of the parameters were written; Optuna's retry then takes its slot."""
    undisturbed = optuna.create_study(sampler=TrustRegionSampler(seed=5, space=SPACE, round_size=4))
    for _ in range(30):
        step(undisturbed)
    study = optuna.create_study(sampler=TrustRegionSampler(seed=5, space=SPACE, round_size=4))
    killer = random.Random(0)
    while len(points(study)) < 30:
        if killer.random() < 0.3:
            some = dict(list(SPACE.items())[:suggested])
            _retry(study, study.ask(some))
            study.sampler = TrustRegionSampler(seed=5, space=SPACE, round_size=4)
        step(study)
    assert len(study.trials) > 33  # some were killed
    assert points(study) == points(undisturbed)
    assert study.sampler.state(study) == undisturbed.sampler.state(undisturbed)


def _retry(study: Any, trial: Any) -> None:
    """What the heartbeat's callback does with a dead worker's trial."""
    study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
    dead: FrozenTrial = study._storage.get_trial(trial._trial_id)
    attrs = {"failed_trial": dead.number, "retry_history": [], **dead.system_attrs}
    attrs["retry_history"] = [*attrs["retry_history"], dead.number]
    study.add_trial(
        create_trial(
            state=TrialState.WAITING,
            params=dead.params,
            distributions=dead.distributions,
            user_attrs=dead.user_attrs,
            system_attrs=attrs,
        )
    )


def test_a_worker_that_dies_while_it_tags_leaves_no_half_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A trial with a tag is not tagged again: it must have its replicate, too, by then."""
    study = optuna.create_study(sampler=TrustRegionSampler(space=SPACE))
    written: list[str] = []

    def dies(trial_id: int, key: str, value: object) -> None:
        written.append(key)
        raise KeyboardInterrupt

    for name in ("set_trial_user_attr", "set_trial_system_attr"):
        monkeypatch.setattr(study._storage, name, dies)
    with pytest.raises(KeyboardInterrupt):
        study.ask(SPACE)
    assert written == ["replicate"]


def test_replicates_repeat_a_point_and_say_which_run_of_it_they_are() -> None:
    sampler = TrustRegionSampler(space=SPACE, start_replicates=2, round_size=6)
    study = optuna.create_study(sampler=sampler)
    seen = []
    for _ in range(40):
        trial = study.ask(SPACE)
        # As the objective sees it, before the trial is read again.
        replicate = trial.user_attrs[REPLICATE]
        point = study.trials[trial.number].system_attrs[TAG]["point"]
        seen.append((point, replicate, trial.params))
        study.tell(trial, noisy(trial.params, replicate))
    assert [(point, replicate) for point, replicate, _ in seen[:3]] == [(-1, 0), (-1, 1), (2, 0)]
    first = {point: params for point, replicate, params in seen if replicate == 0}
    repeated = [(point, params) for point, replicate, params in seen if replicate > 0]
    assert len(repeated) > 2
    assert all(first[point] == params for point, params in repeated)


@pytest.mark.parametrize("how", ["inf", "attribute", "failed", "pruned"])
def test_a_diverged_run_ranks_last_however_it_is_told(how: str) -> None:
    sampler = TrustRegionSampler(space=SPACE, round_size=2, start_replicates=2)
    study = optuna.create_study(sampler=sampler)
    for _ in range(2):
        study.tell(study.ask(SPACE), 1.0)
    for _ in range(3):  # two children and a step
        trial = study.ask(SPACE)
        if how == "inf":
            study.tell(trial, math.inf)
        elif how == "attribute":
            trial.set_user_attr("diverged", True)
            study.tell(trial, 0.1)  # the lowest of all, were it a loss
        else:
            state = TrialState.FAIL if how == "failed" else TrialState.PRUNED
            study.tell(trial, state=state)
    state = sampler.state(study)
    assert state.rounds[0].challenger is None
    assert (state.incumbent, state.loss) == (START, 1.0)
    assert state.scale == pytest.approx(1 / 1.5)


def test_without_a_space_it_is_learned_from_the_trials_and_other_kinds_are_drawn(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    sampler = TrustRegionSampler(start={"lr": 4e-3}, round_size=8)
    study = optuna.create_study(sampler=sampler)

    def objective(trial: Any) -> float:
        a = trial.suggest_float("a", -2, 2)
        lr = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
        heads = trial.suggest_int("heads", 1, 64)
        return float((a - 1) ** 2 + math.log(lr / 1e-2) ** 2) + 0.0 * heads

    study.optimize(objective, n_trials=60)
    first = study.trials[0].params
    assert (first["a"], first["lr"]) == (0.0, pytest.approx(4e-3))
    heads = {}
    for trial in study.trials:
        point = trial.system_attrs[TAG]["point"]
        # One draw for each point, for all its runs.
        assert heads.setdefault(point, trial.params["heads"]) == trial.params["heads"]
        first = next(t for t in study.trials if t.system_attrs[TAG]["point"] == point)
        assert trial.params == first.params
    assert len(set(heads.values())) > 10
    assert [record.message for record in caplog.records if "heads" in record.message] == [
        "heads is no float parameter that all trials share: it is drawn at random"
    ]
    assert sampler.state(study).loss < 0.5


def test_enqueued_and_foreign_trials_can_become_the_incumbent() -> None:
    sampler = TrustRegionSampler(space=SPACE, round_size=1)
    study = optuna.create_study(sampler=sampler)
    for _ in range(3):
        step(study)
    best = {"a": 1.0, "b": 1.0, "lr": 1e-2, "step": 0.0}
    study.enqueue_trial(best)
    for _ in range(4):
        trial = study.ask(SPACE)
        study.tell(trial, noisy(trial.params, trial.number))
    assert sampler.params(study, sampler.state(study).incumbent) == best
    # A trial of another space is not a point of this one.
    incumbent = sampler.state(study).incumbent
    other = {"z": FloatDistribution(0, 1)}
    study.add_trial(create_trial(params={"z": 0.5}, distributions=other, value=-9.0))
    assert sampler.state(study).incumbent == incumbent


def test_an_enqueued_point_is_its_own_and_the_rest_of_it_a_childs() -> None:
    """Its loss must not be entered as one of the start, which challengers are held to."""
    sampler = TrustRegionSampler(space=SPACE, seed=2, start_replicates=2, subset=0.25)
    study = optuna.create_study(sampler=sampler)
    study.enqueue_trial({"lr": 3e-2})
    step(study)
    given = study.trials[0]
    assert given.system_attrs[TAG] == {"point": 0, REPLICATE: 0}
    assert given.params["lr"] == 3e-2
    start = sampler.params(study, START)
    assert sum(given.params[name] != start[name] for name in ("a", "b", "step")) <= 1
    for _ in range(2):
        step(study)
    state = sampler.state(study)
    assert (state.incumbent, state.runs) == (START, 2)
    assert all(trial.params == start for trial in study.trials[1:])


def test_bad_arguments_are_refused() -> None:
    for arguments, words in [
        ({"round": 3}, "no setting round; there are .*round_size"),
        ({"floor_scale": 3}, "no setting floor_scale"),
        ({"ceiling": 3.0}, "no setting ceiling"),
        ({"subset": 0.0}, r"subset=0.0 must be in \(0, 1\]"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"floor": 0.0}, "floor=0.0 must be above 0"),
        ({"radius": {"a": 0.5}}, "radius of b is None"),
        ({"radius": -0.5}, "radius of a is -0.5"),
        ({"start": {"lr": 1.0}}, "start of lr is 1.0, outside"),
    ]:
        with pytest.raises(ConfigError, match=words):
            TrustRegionSampler(space=SPACE, **arguments)  # type: ignore[arg-type]
    study = optuna.create_study(directions=["minimize"] * 2, sampler=TrustRegionSampler())
    with pytest.raises(ValueError, match="multi-objective"):
        study.ask(SPACE)


def test_a_start_radius_below_the_floor_is_not_widened_to_it() -> None:
    space = {"a": FloatDistribution(-1, 1), "b": FloatDistribution(-1, 1)}
    sampler = TrustRegionSampler(space=space, radius={"a": 0.5, "b": 0.01}, round_size=8)
    study = optuna.create_study(sampler=sampler)
    for number in range(100):
        study.tell(study.ask(space), float(number))  # nothing is ever better
    moved = [abs(trial.params["b"]) for trial in study.trials]
    assert 0.005 < max(moved) <= 0.01
    assert min(entry.scale for entry in sampler.state(study).rounds) == pytest.approx(0.04)


def test_the_surrogate_is_brought_down_with_cliffs_all_around() -> None:
    surrogate = synthetic(12, seed=1)
    sampler = TrustRegionSampler(space=surrogate.space, subset=0.5)
    study = optuna.create_study(sampler=sampler)
    fell = 0
    for _ in range(150):
        trial = study.ask(surrogate.space)
        fell += surrogate.diverges(trial.params)
        loss = surrogate.loss(trial.params)
        study.tell(trial, loss + random.Random(trial.number).gauss(0, 0.005))
    state = sampler.state(study)
    found = surrogate.loss(sampler.params(study, state.incumbent))
    start = surrogate.level
    assert fell > 0
    assert found < start - 0.5 * (start - surrogate.best)
