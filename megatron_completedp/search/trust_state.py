"""The trust-region search as a function: finished runs in, incumbent and region out.

A search is a sequence of rounds. Round k is the k-th `round_size` children in the order of their
slots. After it, a step down a linear model of the children, or the best of them, challenges the
incumbent, and the round's success rate moves the scale of the region.
Nothing here knows clocks, workers or Optuna, so the state is the same whoever asks, in whatever
order the runs ended, and after any restart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

from megatron_completedp.search.challenge import Books
from megatron_completedp.search.trust_rules import START, Rules, step_after

#: A run overtaken by this many rounds of later ended runs is taken for dead: a worker that vanished
#: from a storage without heartbeats must not hold its round open for good. If it ends after all, it
#: counts, because the state is always worked out from the beginning.
OVERTAKEN_ROUNDS = 2


@dataclass(frozen=True)
class Run:
    """One run as the search sees it."""

    slot: int
    """Its place in the study's sequence; a retry of a dead worker's run has the slot of that."""
    point: int
    """What it ran: `START`, its own slot for a child, or what `step_after` names."""
    replicate: int
    """Which run of the point this is; 0 is the first. Runs of one number share their seed, so that
    points are compared number by number; where they do not, that costs some power."""
    loss: float | None
    """Lower is better; None while it runs, inf if it diverged, was pruned or failed for good."""
    centre: tuple[int, ...] | None = None
    """Points whose mean a child was drawn around; None for a child that something else proposed."""
    scale: float = 1.0
    """Scale of the region a child was drawn from, or a step was taken in."""


@dataclass(frozen=True)
class Round:
    """A decided round: why the state is what it is. Nothing is worked out from it."""

    scale: float
    """Scale of the region while it was drawn."""
    successes: int
    """Children not above the incumbent by more than the allowance, of the voters."""
    voters: int
    """Children drawn from the present region."""
    challenger: int | None
    """The step, where it was no worse than the allowance, or the best child below the incumbent."""
    accepted: bool
    """Whether the challenger became the incumbent."""
    restarted: bool
    """Whether the region went back to its start after this round."""


@dataclass(frozen=True)
class State:
    """What the finished runs say."""

    incumbent: int
    """The point to beat."""
    loss: float
    """Mean of its runs; inf while it has none that ended well."""
    runs: int
    """How many runs that mean is of."""
    noise: float
    """Standard deviation of a run over seeds, pooled over repeated points; inf without any."""
    centre: tuple[int, ...]
    """Points whose mean children are drawn around."""
    scale: float
    """Of the region: a coordinate's radius is this times its start radius."""
    rounds: tuple[Round, ...]
    """The decided rounds."""
    wanted: tuple[tuple[int, int], ...]
    """(point, replicate) to be run before the search can go on."""


def fold(runs: Sequence[Run], rules: Rules) -> State:
    """The state of a search after `runs`, in any order."""
    runs = sorted(runs, key=attrgetter("slot"))
    books = Books(_ended(runs, rules), rules)
    children = [run for run in runs if run.point == run.slot]
    incumbent, scale = START, 1.0
    centre: tuple[int, ...] = (START,)
    rounds: list[Round] = []
    stalled = 0
    wanted = books.missing(START, rules.start_replicates)
    for first in range(0, len(children) - rules.round_size + 1, rules.round_size):
        batch = children[first : first + rules.round_size]
        if wanted or any((run.point, 0) not in books.ended for run in batch):
            break
        bar = books.bar(incumbent)
        lenient = bar + books.allowance()
        ranked = sorted((books.ended[run.point, 0], run.point) for run in batch)
        proposed_elsewhere = {run.point for run in batch if run.centre is None}
        step = step_after(len(rounds))
        if rules.linear_step and (step, 0) not in books.ended:
            wanted = ((step, 0),)
            break
        # A child was the lowest of many, by luck too: it only challenges where no step does.
        candidates = [(*ranked[0], bar)]
        if rules.linear_step:
            given = [(*entry, bar) for entry in ranked if entry[1] in proposed_elsewhere]
            candidates = [min([(books.ended[step, 0], step, lenient), *given]), *candidates]
        challenger = next((point for loss, point, limit in candidates if loss < limit), None)
        verdict = challenger is not None and books.challenge(challenger, incumbent)
        if isinstance(verdict, tuple):
            wanted = verdict
            break
        voters = [run for run in batch if (run.centre, run.scale) == (centre, scale)]
        successes = sum(books.ended[run.point, 0] < lenient for run in voters)
        at_floor = scale <= rules.floor and bool(voters) and not verdict
        stalled = stalled + 1 if at_floor else 0
        restarted = 0 < rules.stall <= stalled
        rounds.append(Round(scale, successes, len(voters), challenger, verdict, restarted))
        if verdict and challenger is not None:
            incumbent = challenger
        centre = _centre(ranked, incumbent, books.bar(incumbent), rules)
        scale = 1.0 if restarted else _scale(scale, successes, len(voters), rules)
        stalled = 0 if restarted else stalled
    return State(
        incumbent=incumbent,
        loss=books.mean(incumbent),
        runs=len(books.losses.get(incumbent, ())),
        noise=books.noise.run().deviation,
        centre=centre,
        scale=scale,
        rounds=tuple(rounds),
        wanted=wanted,
    )


def _ended(runs: Sequence[Run], rules: Rules) -> dict[tuple[int, int], float]:
    """Loss by (point, replicate) of the runs that ended or were overtaken."""
    ended = [run for run in runs if run.loss is not None]
    limit = OVERTAKEN_ROUNDS * rules.round_size
    newest_dead = ended[-limit].slot if len(ended) >= limit else -1
    losses = {(run.point, run.replicate): math.inf for run in runs if run.slot < newest_dead}
    # Two workers that ask at the same moment may repeat a point under one name: the first counts.
    for run in reversed(ended):
        losses[run.point, run.replicate] = run.loss if run.loss is not None else math.inf
    return losses


def _scale(scale: float, successes: int, voters: int, rules: Rules) -> float:
    """The scale after a round; a round without voters says nothing about the region."""
    if voters == 0:
        return scale
    if successes >= rules.success_rate * voters:
        return min(scale * rules.widen, rules.ceiling)
    return max(scale / rules.narrow, rules.floor)


def _centre(
    ranked: Sequence[tuple[float, int]], incumbent: int, loss: float, rules: Rules
) -> tuple[int, ...]:
    """The points that the next children are drawn around the mean of."""
    if not rules.recentre:
        return (incumbent,)
    others = [entry for entry in ranked if entry[1] != incumbent]
    pool = sorted([(loss, incumbent), *others])[: math.ceil((len(others) + 1) / 4)]
    near = [point for value, point in pool if value <= loss + rules.cliff and math.isfinite(value)]
    return tuple(sorted(near)) or (incumbent,)
