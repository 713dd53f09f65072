"""The trust-region search as a function of runs: no study, no sampler."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_completedp.errors import ConfigError
from megatron_completedp.search.trust_rules import START, Rules, step_after
from megatron_completedp.search.trust_state import OVERTAKEN_ROUNDS, Run, State, fold


def best_child(**rules: Any) -> Rules:
    """Rules by which the best child of a round challenges, and no step."""
    return Rules(**{"linear_step": False, "round_size": 8, **rules})


#: Rounds of two, one start run and no fresh runs or guard: a noise-free search by hand.
PLAIN = best_child(round_size=2, start_replicates=1, confirm=0, guard=0.0)


def start(*losses: float | None, slot: int = 0) -> list[Run]:
    return [Run(slot + i, START, i, loss) for i, loss in enumerate(losses)]


def child(slot: int, loss: float | None, state: State | None = None) -> Run:
    """A child drawn from the region of `state`, or from the start's."""
    centre, scale = ((START,), 1.0) if state is None else (state.centre, state.scale)
    return Run(slot, slot, 0, loss, centre, scale)


def test_a_search_first_asks_for_the_runs_of_its_start() -> None:
    rules = best_child(start_replicates=3)
    assert fold([], rules).wanted == ((START, 0), (START, 1), (START, 2))
    assert fold(start(1.0, None), rules).wanted == ((START, 1), (START, 2))
    state = fold(start(1.0, 1.2, 1.4), rules)
    assert (state.wanted, state.runs, state.loss) == ((), 3, pytest.approx(1.2))
    assert state.noise == pytest.approx(0.2)  # statistics.stdev of the three


def test_the_best_child_below_the_incumbent_takes_over_once_its_round_is_complete() -> None:
    runs = [*start(1.0), child(1, 0.8)]
    assert fold(runs, PLAIN).incumbent == START
    assert fold([*runs, child(2, None)], PLAIN).incumbent == START
    assert fold([*runs, child(2, 0.9)], PLAIN).incumbent == 1
    assert fold([*start(1.0), child(1, 1.1), child(2, 1.2)], PLAIN).incumbent == START


@pytest.mark.parametrize(
    ("losses", "scale"),
    [((0.9, 1.1), 1.5), ((1.1, 1.2), 1 / 1.5), ((math.inf, math.inf), 1 / 1.5)],
)
def test_a_fifth_of_successes_widens_and_less_narrows(
    losses: tuple[float, ...], scale: float
) -> None:
    runs = [*start(1.0), *(child(1 + i, loss) for i, loss in enumerate(losses))]
    assert fold(runs, PLAIN).scale == pytest.approx(scale)


def test_what_the_noise_explains_is_no_failure() -> None:
    """Two runs apart by noise alone: the start's was the lucky one, and the region stays wide."""
    seeds = [Run(slot, START, slot, loss) for slot, loss in enumerate((0.98, 1.0, 1.02))]
    children = [child(3 + i, 0.99 + 0.001 * i) for i in range(8)]  # all above the start's run
    lenient, strict = best_child(start_replicates=3), best_child(start_replicates=3, allowance=0)
    assert fold([*seeds, *children], strict).scale == pytest.approx(1 / 1.5)
    widened = fold([*seeds, *children], lenient)
    assert widened.scale == pytest.approx(1.5)
    assert widened.rounds[0].successes == 8
    # Single runs scatter by 0.02, their differences by 0.028: what is further above is a failure.
    far = [child(3 + i, 1.009 + 0.001 * i) for i in range(8)]
    assert fold([*seeds, *far], lenient).scale == pytest.approx(1 / 1.5)


def test_a_step_no_worse_than_the_noise_challenges() -> None:
    seeds = [Run(slot, START, slot, loss) for slot, loss in enumerate((0.98, 1.0, 1.02))]
    rules = Rules(round_size=2, start_replicates=3)
    runs = [*seeds, child(3, 1.1), child(4, 1.2)]
    step = step_after(0)
    assert fold([*runs, Run(5, step, 0, 1.0)], rules).wanted[0] == (step, 1)
    assert fold([*runs, Run(5, step, 0, 1.01)], rules).wanted == ()
    strict = Rules(round_size=2, start_replicates=3, allowance=0)
    assert fold([*runs, Run(5, step, 0, 1.0)], strict).wanted == ()


def test_the_scale_stays_between_floor_and_ceiling_and_goes_back_after_a_stall() -> None:
    rules = best_child(
        round_size=1, start_replicates=1, confirm=0, guard=0, floor=0.3, ceiling=2.0, stall=2
    )
    runs, seen = start(1.0), []
    for slot in range(1, 9):
        runs.append(child(slot, 2.0, fold(runs, rules)))
        seen.append(fold(runs, rules).scale)
    # Four rounds to the floor of which the last is clamped, two at it, and back to 1.
    assert seen[:6] == pytest.approx([1 / 1.5, 1 / 1.5**2, 0.3, 0.3, 1.0, 1 / 1.5])
    assert [decided.restarted for decided in fold(runs, rules).rounds].count(True) == 1
    assert fold(runs, rules).incumbent == START  # a restart forgets nothing

    for slot in range(9, 14):
        runs.append(child(slot, -float(slot), fold(runs, rules)))
    assert fold(runs, rules).scale == 2.0

    never = best_child(round_size=1, start_replicates=1, confirm=0, guard=0, floor=0.3, stall=0)
    assert not any(decided.restarted for decided in fold(runs[:9], never).rounds)


def test_children_of_another_region_may_win_but_do_not_vote_on_the_radius() -> None:
    old = [child(3, 0.9), child(4, 0.85)]  # drawn around the start before child 1 took over
    state = fold([*start(1.0), child(1, 0.8), child(2, 0.9), *old], PLAIN)
    assert (state.incumbent, state.rounds[1].voters) == (1, 0)
    assert state.scale == 1.5  # from the first round alone; two failures would have narrowed it
    foreign = [Run(3, 3, 0, 0.7), Run(4, 4, 0, 0.9)]
    state = fold([*start(1.0), child(1, 0.8), child(2, 0.9), *foreign], PLAIN)
    assert (state.incumbent, state.scale) == (3, 1.5)


def test_a_challenger_is_judged_by_fresh_runs_and_not_by_the_one_it_was_chosen_for() -> None:
    rules = best_child(round_size=2, start_replicates=3, confirm=3)
    runs = [*start(1.0, 1.02, 0.98), child(3, 0.5), child(4, 1.1)]
    assert fold(runs, rules).wanted == ((3, 1),)
    worse = fold([*runs, Run(5, 3, 1, 1.2)], rules)
    assert (worse.incumbent, worse.wanted) == (START, ())  # settled by one run
    # A little worse does not settle it before the noise on equal seeds is known.
    assert fold([*runs, Run(5, 3, 1, 1.01)], rules).wanted == ((3, 2),)
    better = fold([*runs, Run(5, 3, 1, 0.9)], rules)
    assert (better.incumbent, better.loss, better.runs) == (3, 0.9, 1)


def test_between_worse_and_surely_better_more_runs_are_asked_for_up_to_the_limit() -> None:
    rules = best_child(round_size=1, start_replicates=3, confirm=3)
    runs = [*start(1.0, 1.02, 0.98), child(3, 0.9)]
    for step in (1, 2):
        assert fold(runs, rules).wanted == ((3, step),)
        runs.append(Run(3 + step, 3, step, 0.999))
    # The third seed is one that the start has not run either.
    assert fold(runs, rules).wanted == ((3, 3), (START, 3))
    state = fold([*runs, Run(6, 3, 3, 0.999), Run(7, START, 3, 1.0)], rules)
    assert (state.wanted, state.incumbent) == ((), START)


def test_the_incumbent_is_run_again_when_its_challenger_has_more_runs() -> None:
    rules = best_child(round_size=1, start_replicates=2, confirm=3)
    runs = [*start(1.0, 1.02), child(2, 0.5), Run(3, 2, 1, 0.5)]
    assert fold(runs, rules).incumbent == 2  # on one run
    # A gain of 0.01 where two runs have a standard error of 0.014 * sqrt(2).
    runs += [child(4, 0.47), Run(5, 4, 1, 0.49)]
    assert fold(runs, rules).wanted == ((4, 2), (2, 2))


def test_cliffs_rank_last_and_are_never_averaged() -> None:
    # The start's third run broke: neither its mean nor the noise knows, wherever it stands.
    for losses in ((1.0, 1.2, 9.0), (9.0, 1.0, 1.2)):
        state = fold(start(*losses), best_child())
        assert (state.loss, state.runs) == (pytest.approx(1.1), 2)
        assert state.noise == pytest.approx(0.1 * math.sqrt(2))
    # Negative control: without the rule the same runs have a mean of 3.7.
    assert fold(start(1.0, 1.2, 9.0), best_child(cliff=math.inf)).loss == pytest.approx(11.2 / 3)
    # A challenger with one run off the cliff is rejected, whatever its others.
    rules = best_child(round_size=1, confirm=2)
    runs = [*start(1.0, 1.2, 1.1), child(3, 0.9), Run(4, 3, 1, math.inf)]
    assert fold(runs, rules).incumbent == START
    assert fold(runs, rules).wanted == ()


def test_a_start_that_diverges_gives_way_to_the_first_point_that_does_not() -> None:
    runs = [*start(math.inf, math.inf, math.inf), child(3, 5.0), Run(4, 3, 1, 5.1)]
    state = fold(runs, best_child(round_size=1))
    assert (state.incumbent, state.loss) == (3, 5.1)


def test_a_run_that_never_ends_holds_its_round_open_only_until_it_is_overtaken() -> None:
    runs = [*start(1.0), child(1, None), child(2, 0.5)]
    later = [child(3 + i, 2.0) for i in range(2 * OVERTAKEN_ROUNDS)]
    assert fold([*runs, *later[:-2]], PLAIN).incumbent == START
    assert fold([*runs, *later], PLAIN).incumbent == 2
    # It comes back, better than all: nothing is lost.
    runs[1] = child(1, 0.1)
    assert fold([*runs, *later], PLAIN).incumbent == 1


def test_recentring_takes_the_best_quarter_of_round_and_incumbent() -> None:
    rules = best_child(round_size=7, start_replicates=1, confirm=0, guard=0, recentre=True)
    losses = [0.9, 1.1, 0.8, 1.2, 1.3, 1.4, 1.5]
    runs = [*start(1.0), *(child(1 + i, loss) for i, loss in enumerate(losses))]
    state = fold(runs, rules)
    assert (state.incumbent, state.centre) == (3, (1, 3))  # 2 of 7 children and the incumbent


@given(
    st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(0, 3), st.booleans(), st.booleans()
)
@settings(max_examples=15, deadline=None)
def test_the_order_of_the_runs_does_not_matter(
    seed: int, round_size: int, confirm: int, recentre: bool, linear_step: bool
) -> None:
    rules = Rules(
        round_size=round_size, confirm=confirm, recentre=recentre, linear_step=linear_step
    )
    runs = _search(lambda point, _: 1.0 - 0.01 * abs(point), rules, slots=40, seed=seed)
    shuffled = list(runs)
    random.Random(seed).shuffle(shuffled)
    assert fold(shuffled, rules) == fold(runs, rules)


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.booleans())
@settings(max_examples=10, deadline=None)
def test_later_runs_never_change_a_decided_round(
    seed: int, round_size: int, linear_step: bool
) -> None:
    """A decision that used whatever is known by now would be taken differently later."""
    rules = Rules(round_size=round_size, linear_step=linear_step)
    runs = _search(lambda point, _: 1.0 - 0.01 * abs(point), rules, slots=40, seed=seed)
    whole = fold(runs, rules).rounds
    for count in range(len(runs)):
        part = fold(runs[:count], rules).rounds
        assert part == whole[: len(part)]


def test_what_seeds_do_to_every_point_alike_is_no_noise() -> None:
    """Gains of 0.01 under seeds that move every loss by 0.1: seen on equal seeds only."""
    seeds = np.random.default_rng(0).normal(0, 0.1, 10)

    def loss(point: int, replicate: int) -> float:
        return 1.0 - 0.001 * max(point, 0) + seeds[replicate]

    runs = _search(loss, best_child(), slots=90, seed=0, noise=0.003)
    state = fold(runs, best_child())
    assert sum(decided.accepted for decided in state.rounds) >= 5
    assert state.noise > 0.02  # of a run, seeds included

    # Negative control: the same size of scatter, drawn anew for every run.
    apart = _search(lambda point, _: loss(point, 9), best_child(), slots=90, seed=0, noise=0.1)
    accepted = sum(decided.accepted for decided in fold(apart, best_child()).rounds)
    assert accepted < sum(decided.accepted for decided in state.rounds)


def _search(loss: object, rules: Rules, *, slots: int, seed: int, noise: float = 0.05) -> list[Run]:
    """Runs of one worker whose point p has the loss `loss(p, replicate)` + noise."""
    generator = np.random.default_rng(seed)
    assert callable(loss)
    runs: list[Run] = []
    for slot in range(slots):
        state = fold(runs, rules)
        point, replicate = state.wanted[0] if state.wanted else (slot, 0)
        value = loss(point, replicate) + noise * generator.normal()
        centre = None if state.wanted else state.centre
        runs.append(Run(slot, point, replicate, value, centre, state.scale))
    return runs


def _accepted(rules: Rules, searches: int = 20) -> tuple[int, int]:
    """Rounds accepted and decided on an objective that is nothing but noise."""
    rounds = [
        decided
        for seed in range(searches)
        for decided in fold(_search(lambda *_: 1.0, rules, slots=120, seed=seed), rules).rounds
    ]
    return sum(decided.accepted for decided in rounds), len(rounds)


def test_noise_alone_rarely_moves_the_incumbent() -> None:
    """Measured 2.9 % of 244 rounds, with a standard deviation of 1.1 %.

    One look at 2 standard errors would pass 2.3 %; three looks and noise from few degrees of
    freedom pass more, against which an incumbent that was accepted by luck is harder to beat.
    """
    accepted, rounds = _accepted(best_child())
    assert rounds > 150
    assert accepted / rounds < 0.07

    # Negative controls, measured 15 % and 20 %: no guard, and no fresh runs either. They would
    # be half of the rounds and more, were an incumbent that was lucky not ever harder to beat.
    unguarded, rounds = _accepted(best_child(guard=0))
    assert unguarded / rounds > 0.1
    greedy, rounds = _accepted(best_child(guard=0, confirm=0))
    assert greedy / rounds > 0.14


@pytest.mark.parametrize(
    "wrong",
    [
        {"round_size": 0},
        {"start_replicates": 0},
        {"confirm": -1},
        {"widen": 0.9},
        {"guard": math.nan},
        {"floor": 0.0},
        {"ceiling": 0.5},
    ],
)
def test_rules_that_cannot_be_meant_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Rules(**wrong)  # type: ignore[arg-type]
