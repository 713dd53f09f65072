"""Who gets which trial: new ones, and those whose worker was stopped, killed or lost."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

pytest.importorskip("optuna")

import optuna
from optuna.trial import FrozenTrial, TrialState
from search_samples import COST, facts, objective, queue, settings, write_run
from sqlalchemy.exc import OperationalError

from megatron_completedp.config.load import to_yaml
from megatron_completedp.data.claims import claim
from megatron_completedp.errors import ConfigError
from megatron_completedp.search.access import sampler_by_slot
from megatron_completedp.search.objective import Facts
from megatron_completedp.search.outage import heartbeat
from megatron_completedp.search.proposal import propose
from megatron_completedp.search.queue import Queue, begun
from megatron_completedp.search.samplers import make_sampler
from megatron_completedp.search.settings import DatabaseSettings


def take(one: Queue, held: ExitStack) -> int:
    taken = one.take(held)
    assert taken is not None
    return taken.trial.number


def trials(one: Queue) -> list[FrozenTrial]:
    return one.study.get_trials(deepcopy=False)


def states(one: Queue) -> list[str]:
    return [trial.state.name for trial in trials(one)]


def test_a_trial_gets_its_result_and_the_search_ends(tmp_path: Path) -> None:
    one = queue(tmp_path, trials=1)
    with ExitStack() as held:
        taken = one.take(held)
        assert taken is not None
        assert (taken.name, taken.replicate) == ("0000", 0)
        assert not one.finished()
        one.complete(taken, facts(3.0, 4.0))
    assert one.take(ExitStack()) is None
    assert one.finished()
    (trial,) = trials(one)
    assert trial.value == 3.5
    assert trial.user_attrs["losses"] == [3.0, 4.0]
    assert trial.user_attrs["worker"] == "worker"
    assert trial.user_attrs["flops"] == 1e9


def test_a_diverged_trial_is_a_result_at_the_ceiling(tmp_path: Path) -> None:
    one = queue(tmp_path, trials=1)
    with ExitStack() as held:
        taken = one.take(held)
        assert taken is not None
        one.complete(taken, facts(3.0, None))
    (trial,) = trials(one)
    assert trial.state == TrialState.COMPLETE
    assert trial.value == one.objective.ceiling == pytest.approx(6.238, abs=1e-3)  # ln 512
    assert trial.user_attrs["diverged"] is True
    assert one.finished()


def test_two_workers_never_train_the_same_trial(tmp_path: Path) -> None:
    one, two = queue(tmp_path, trials=2), queue(tmp_path, trials=2)
    with ExitStack() as first, ExitStack() as second:
        assert take(one, first) != take(two, second)
        # Neither is taken for dead by the other, and no third is begun.
        assert one.take(ExitStack()) is None
        assert two.take(ExitStack()) is None
        assert states(one) == ["RUNNING", "RUNNING"]
        assert not one.finished()


def test_a_dead_workers_trial_is_repeated_at_once(tmp_path: Path) -> None:
    dead, other = queue(tmp_path), queue(tmp_path)
    with ExitStack() as held:
        take(dead, held)
    # The lock has gone with the worker; the trial runs still, as far as the study knows.
    with ExitStack() as held:
        taken = other.take(held)
        assert taken is not None
        assert (taken.trial.number, taken.name) == (1, "0000"), "same folder"
        first, second = trials(other)
        assert first.state == TrialState.FAIL
        assert first.params == taken.params
        assert second.system_attrs["failed_trial"] == 0
        assert begun(trials(other)) == 1
        assert other.given_up(trials(other)) == []


def test_a_dead_worker_whose_lock_is_left_is_found_by_its_heartbeats(tmp_path: Path) -> None:
    database = DatabaseSettings(heartbeat_s=1, grace_s=2, retry_s=0)
    lost, other = queue(tmp_path, database=database), queue(tmp_path, database=database)
    with ExitStack() as held, ExitStack() as mine:
        taken = lost.take(held)
        assert taken is not None
        with heartbeat(lost.storage, taken.trial._trial_id):
            time.sleep(2.5)
            assert take(other, mine) == 1, "signs of life keep a trial for its worker"
        # Databases keep whole seconds: the grace period and one more.
        time.sleep(3.5)
        assert not other.finished()
        assert trials(other)[0].state == TrialState.RUNNING, "it may be the database that was away"
        time.sleep(1.1)
        again = other.take(mine)
        assert again is not None
        assert again.params == taken.params
        assert again.name == "0000-again1", "the lost one may still write into its folder"
        assert trials(other)[0].user_attrs["flops"] == 0, "as far as its folder tells"
        # It was not dead, after all: its result comes too late, and breaks nothing.
        lost.complete(taken, facts(3.0))
        assert trials(other)[0].state == TrialState.FAIL


def test_a_trial_is_repeated_only_so_often(tmp_path: Path) -> None:
    one = queue(tmp_path, trials=1, retries=2)
    for _ in range(3):
        with ExitStack() as held:
            take(one, held)
    assert one.take(ExitStack()) is None
    assert states(one) == ["FAIL", "FAIL", "FAIL"]
    assert [trial.system_attrs.get("retry_history") for trial in trials(one)] == [None, [0], [0, 1]]
    assert one.finished(), "one bad trial does not hold up the search"
    assert one.given_up(trials(one)) == [2]


def test_stops_by_a_signal_do_not_count(tmp_path: Path) -> None:
    one = queue(tmp_path, trials=1, retries=0)
    for _ in range(3):
        with ExitStack() as held:
            taken = one.take(held)
            assert taken is not None
            one.give_back(taken, COST)
    with ExitStack() as held:
        taken = one.take(held)
        assert taken is not None
        assert taken.name == "0000"
        assert "stopped" not in taken.trial.user_attrs, "of the try before"
        one.complete(taken, facts(3.0))
    assert states(one) == ["FAIL", "FAIL", "FAIL", "COMPLETE"]
    assert trials(one)[0].user_attrs["seconds"] == COST.seconds


def test_tries_that_no_worker_began_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An outage between asking and training: without a retry, the point would be lost by it."""
    one = queue(tmp_path, trials=1, retries=0)

    def away(*_: object) -> None:
        raise OperationalError("UPDATE", {}, Exception("it is away"))

    monkeypatch.setattr("megatron_completedp.search.queue.write_attributes", away)
    with pytest.raises(OperationalError):
        one.take(ExitStack())
    monkeypatch.undo()
    with ExitStack() as held:
        assert take(one, held) == 1
    # Negative control: this one had begun.
    assert one.take(ExitStack()) is None
    assert one.given_up(trials(one)) == [1]


def test_a_given_back_trial_is_gone_on_with_in_its_folder(tmp_path: Path) -> None:
    """Also by who asks while the other still holds the lock: its run is saved, and it has ended."""
    one, other = queue(tmp_path, trials=1), queue(tmp_path, trials=1)
    with ExitStack() as held, ExitStack() as mine:
        taken = one.take(held)
        assert taken is not None
        one.give_back(taken, COST)
        again = other.take(mine)
        assert again is not None
        assert again.name == taken.name == "0000"


def test_a_worker_that_dies_between_failing_and_repeating_loses_nothing(tmp_path: Path) -> None:
    one = queue(tmp_path, trials=1)
    with ExitStack() as held:
        taken = one.take(held)
        assert taken is not None
    one.storage.set_trial_state_values(taken.trial._trial_id, TrialState.FAIL)
    assert not queue(tmp_path, trials=1).finished()
    assert states(one) == ["FAIL", "WAITING"]


def test_a_worker_that_dies_while_it_asks_loses_nothing(tmp_path: Path) -> None:
    one = queue(tmp_path, trials=1)
    one.study.ask({"hyperparams.lr": one.objective.space.distributions()["hyperparams.lr"]})
    with ExitStack() as held:
        taken = one.take(held)
        assert taken is not None
        assert set(taken.params) == set(one.objective.space.names)
        assert taken.params["hyperparams.lr"] == trials(one)[0].params["hyperparams.lr"]


def test_the_result_may_be_entered_twice(tmp_path: Path) -> None:
    """The database took it, and went away before it said so."""
    one = queue(tmp_path, trials=1)
    with ExitStack() as held:
        taken = one.take(held)
        assert taken is not None
        one.complete(taken, facts(3.0))
        one.complete(taken, facts(3.0))
    assert states(one) == ["COMPLETE"]


def test_what_a_dead_try_cost_is_read_from_its_folder(tmp_path: Path) -> None:
    """Resumed twice at the same save: each try is charged with the steps that it made itself."""
    one = queue(tmp_path, retries=9)
    folder = tmp_path / "trials" / "0000"
    for ended_at in (4, 7, 9, None):
        with ExitStack() as held:
            taken = one.take(held)
            assert taken is not None
            if ended_at is not None:  # else it was killed before its first step
                write_run(folder, ended_at, saved=4)
            if ended_at == 4:
                one.give_back(taken, COST)
    with ExitStack() as held:
        take(one, held)
    found = [trial.user_attrs for trial in trials(one)[:4]]
    assert [attributes["steps"] for attributes in found] == [COST.steps, 7 - 4, 9 - 4, 0]
    assert found[1]["tokens"] == 3 * 8 * 64
    assert found[1]["flops"] == 6 * one.objective.base.model.parameters * found[1]["tokens"]
    assert 0 <= found[1]["seconds"] < 60
    assert found[3]["seconds"] == 0


def test_a_seeds_run_that_ended_is_charged_once(tmp_path: Path) -> None:
    one = queue(tmp_path, seeds=2)
    for reached in (3, 5):
        with ExitStack() as held:
            take(one, held)
            if reached == 3:
                write_run(tmp_path / "trials" / "0000-seed0", 10, loss=3.0)
            write_run(tmp_path / "trials" / "0000-seed1", reached)
    with ExitStack() as held:
        take(one, held)
    assert [trial.user_attrs["steps"] for trial in trials(one)[:2]] == [10 + 3, 5]


def test_a_finished_trial_is_charged_from_its_save_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at 4, killed at 7: the try that ends it begins again at 4."""
    folder = tmp_path / "trials" / "0000"
    write_run(folder, 7, saved=4)

    def train_point(config_file: Path, **_: object) -> dict[str, object]:
        write_run(folder, 10, loss=3.0)
        return {"loss": 3.0, "diverged": False}

    monkeypatch.setattr("megatron_completedp.search.objective.train_point", train_point)
    found = objective(tmp_path).train({}, name="0000", replicate=0, stop=lambda: False)
    assert isinstance(found, Facts)
    assert found.steps == 6


def test_an_error_counts_like_a_workers_death(tmp_path: Path) -> None:
    """A point whose run always fails must not be what the search tries for ever."""
    one = queue(tmp_path, trials=1, retries=1)
    for _ in range(2):
        with ExitStack() as held:
            taken = one.take(held)
            assert taken is not None
            write_run(tmp_path / "trials" / taken.name, 3)
            one.fail(taken)
    assert one.take(ExitStack()) is None
    assert one.finished()
    assert states(one) == ["FAIL", "FAIL"]
    assert [trial.user_attrs["steps"] for trial in trials(one)] == [3, 3]
    assert not any("stopped" in trial.user_attrs for trial in trials(one))


def test_a_proposal_under_way_sees_no_try_that_failed_but_is_to_be_repeated(tmp_path: Path) -> None:
    """A sampler takes a failed try for a diverged one."""
    one = queue(tmp_path)
    with ExitStack() as held:
        taken = one.take(held)
        assert taken is not None
        fails = Thread(target=one.fail, args=(taken,))
        with claim(tmp_path / "claims" / "ask", wait=True):  # as `take` has, while it proposes
            fails.start()
            fails.join(timeout=1.0)
            assert states(one) == ["RUNNING"]
        fails.join()
        assert states(one) == ["FAIL"]


def test_the_run_of_another_search_is_not_taken_for_the_trials(tmp_path: Path) -> None:
    runs = objective(tmp_path)
    ((file, config),) = runs.configs({}, name="0000", replicate=0)
    file.parent.mkdir()
    other = replace(config, hyperparams=replace(config.hyperparams, lr=0.5))
    file.write_text(to_yaml(other))
    write_run(Path(config.run_dir), 10, loss=2.345)
    with pytest.raises(ConfigError, match="is a trial of another search"):
        runs.train({}, name="0000", replicate=0, stop=lambda: False)
    # Negative control: its own run is read, and nothing is trained.
    file.write_text(to_yaml(config))
    found = runs.train({}, name="0000", replicate=0, stop=lambda: False)
    assert isinstance(found, Facts)
    assert (found.losses, found.steps) == ((2.345,), 0)


def test_replicates_never_share_a_seed(tmp_path: Path) -> None:
    runs = queue(tmp_path).objective
    seeds = [seed for replicate in range(5) for seed in runs.seeds_of(replicate)]
    assert len(set(seeds)) == len(seeds)
    assert runs.seeds_of(0)[0] == runs.base.seed


@pytest.mark.parametrize("sampler", ["trust_region", "random", "tpe"])
def test_one_write_proposes_what_optuna_would(tmp_path: Path, sampler: str) -> None:
    """Trial after trial, the same point as `study.ask`, and as the database gives it back."""
    one = queue(tmp_path, trials=20)
    space = one.objective.space.distributions()
    oracle = optuna.create_study()
    for number in range(20):
        # Ours tells trials apart by their slots; the others get a seed for each.
        seed = 0 if sampler == "trust_region" else number
        for study in (one.study, oracle):
            study.sampler = make_sampler(sampler, seed=seed, space=space)
        trial, params = propose(one.study, one.storage, space)
        expected = oracle.ask({**space})
        assert params == expected.params
        value = sum(value**2 for value in params.values())
        one.study.tell(trial, value)
        oracle.tell(expected, value)
    for kept, expected in zip(trials(one), oracle.trials, strict=True):
        assert kept.params == expected.params
        assert kept.distributions == expected.distributions


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("trust_region", {"start_replicates": 2, "round_size": 3}),
        ("random", {}),
        ("qmc", {}),
        # From the third trial on by their models.
        ("tpe", {"n_startup_trials": 3}),
        ("gp", {"n_startup_trials": 3}),
        ("turbo", {"start_runs": 3}),
    ],
)
def test_a_lost_trial_changes_no_later_point(
    tmp_path: Path, name: str, options: Mapping[str, Any]
) -> None:
    """One worker that dies in its trials 0, 4 and 7 proposes what it would have undisturbed."""
    if name == "turbo":
        pytest.importorskip("botorch")
    proposed = []
    for kills in ((), (0, 4, 7)):
        one = queue(tmp_path / f"{len(kills)}", trials=10)
        chosen = settings(sampler=name, sampler_options=options)
        one = replace(one, sampler=sampler_by_slot(chosen, one.objective.space))
        points: list[Mapping[str, float]] = []
        left = list(kills)
        while not one.finished():
            with ExitStack() as held:
                taken = one.take(held)
                assert taken is not None
                if len(points) in left:
                    left.remove(len(points))
                    continue
                points.append(taken.params)
                one.complete(taken, facts(3.0 + sum(value**2 for value in taken.params.values())))
        assert states(one).count("FAIL") == len(kills)
        proposed.append(points)
    assert proposed[0] == proposed[1]


@pytest.mark.parametrize("name", ["random", "qmc", "tpe"])
def test_workers_that_begin_at_once_get_points_of_their_own(tmp_path: Path, name: str) -> None:
    one = queue(tmp_path, trials=4)
    one = replace(one, sampler=sampler_by_slot(settings(sampler=name), one.objective.space))
    with ExitStack() as held:
        taken = [one.take(held) for _ in range(4)]
    points = {tuple(each.params.values()) for each in taken if each is not None}
    assert len(points) == 4
