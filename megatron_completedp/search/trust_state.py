"""The trust-region search as a function: finished runs in, incumbent and region out.

A search is a sequence of rounds. Round k is the k-th `round_size` children in the order of their
slots. After it, a step down a linear model of the children, or the best of them, challenges the
incumbent, and the round's success rate moves the scale of the region.
Nothing here knows clocks, workers or Optuna, so the state is the same whoever asks, in whatever
order the runs ended, and after any restart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter

from megatron_completedp.errors import ConfigError
from megatron_completedp.search.seed_noise import SeedNoise

#: The point that a search starts from. A child is named by the slot that first ran it.
START = -1

#: A run overtaken by this many rounds of later ended runs is taken for dead: a worker that vanished
#: from a storage without heartbeats must not hold its round open for good. If it ends after all, it
#: counts, because the state is always worked out from the beginning.
OVERTAKEN_ROUNDS = 2


def step_after(number: int) -> int:
    """The name of the point that a step after round `number`, counted from 0, leads to."""
    return START - 1 - number


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


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What the search does; each rule can be switched off for an ablation.

    Section 5 of the rules gives the form of the search and, where the paper publishes no number,
    ours; fields that are not in it say why they have their default.
    """

    round_size: int = 24
    """Children per round. At least the number of workers: else rounds overlap, and those that were
    drawn before the last decision say nothing about the region. More children per round make a
    better model, fewer make steps more often."""
    linear_step: bool = True
    """After a round, try a step of the region's size down a linear model of the children near the
    incumbent. Below the incumbent, it challenges it, else the best child does. Off (an ablation,
    with a `subset` of a quarter), the best child alone does, as in section 5 of the rules. Among
    dozens of coordinates the best of a few children is hardly better than their centre, since what
    it gains in some it pays for in others; the model adds up what all of them say about each."""
    start_replicates: int = 3
    """Runs of the start, from which the noise is first estimated: 2 degrees of freedom, which each
    challenge adds to. 1 for an objective without noise."""
    confirm: int = 3
    """Most fresh runs of a challenger. Its first run was chosen for being low, or its step for the
    losses of that seed: it is biased low and not used; 0 trusts it nevertheless (an ablation)."""
    guard: float = 2.0
    """Standard errors by which a challenger must win on equal seeds; 0 takes any lower mean."""
    cliff: float = 1.0
    """Nats above the incumbent from which a run ranks last and is never averaged: its value says
    that something broke, not how good the point is. inf to average everything that is finite."""
    allowance: float = 1.0
    """Standard errors of a difference between two single runs on equal seeds that a run may lie
    above the incumbent and still be a success, and a step still challenge. Without it noise alone,
    or one lucky run of the start, narrows the region until nothing in it can be told apart."""
    success_rate: float = 0.2
    """Share of a round's children that are successes from which the region widens: the 1/5 rule of
    evolution strategies."""
    widen: float = 1.5
    """Factor on the scale after a round at or above `success_rate`; 1 for a region that stays."""
    narrow: float = 1.5
    """Divisor of the scale after any other round; 1 for a region that stays."""
    floor: float = 0.04
    """Least scale. The sampler sets it so that the widest radius ends at 0.02 nats."""
    ceiling: float = math.inf
    """Largest scale. The sampler sets it to where the region covers the bounds: beyond, widening
    would do nothing but delay the narrowing after it."""
    stall: int = 2
    """Rounds in a row at the floor without a new incumbent until the scale goes back to 1. The
    landscape is near-invex, so the incumbent stays: a fresh start elsewhere would lose everything
    found, and what stalls a search is a region that narrowed below the noise. 0 never restarts."""
    recentre: bool = False
    """Draw children around the mean of the best quarter of the last round and the incumbent. The
    incumbent, which challengers must beat, stays a point that was run."""

    def __post_init__(self) -> None:
        least = {"round_size": 1, "start_replicates": 1, "widen": 1.0, "narrow": 1.0}
        for item in fields(self):
            value, low = getattr(self, item.name), least.get(item.name, 0)
            if not value >= low:
                raise ConfigError(f"trust region: {item.name}={value!r} must be at least {low}")
        if not 0 < self.floor <= 1 <= self.ceiling:
            message = "trust region: the scale starts at 1, so floor must be in (0, 1] and"
            raise ConfigError(f"{message} ceiling at least 1, got {self.floor}, {self.ceiling}")


@dataclass(frozen=True)
class Round:
    """A decided round, for reports."""

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

    @property
    def restarts(self) -> int:
        """How often the region went back to its start."""
        return sum(decided.restarted for decided in self.rounds)


@dataclass
class _Books:
    """Losses that decisions were taken on, by point; a decision never sees more than it asked for.

    Otherwise a run that a later decision asked for would change an earlier one.
    """

    ended: Mapping[tuple[int, int], float]
    rules: Rules
    losses: dict[int, dict[int, float]] = field(default_factory=dict)
    """Of each point by replicate, which stands for a seed; none that diverged."""
    noise: SeedNoise = field(default_factory=SeedNoise)
    attempts: dict[int, int] = field(default_factory=dict)

    def mean(self, point: int) -> float:
        """Mean loss of `point`'s runs, inf without any."""
        losses = self.losses.get(point, {})
        return sum(losses.values()) / len(losses) if losses else math.inf

    def bar(self, incumbent: int) -> float:
        """What children must be below: the incumbent's loss on their seed.

        The start's is its run of that seed. Any other incumbent was chosen by its run of that seed,
        so its fresh runs count, each corrected by how the start's losses on the two seeds differ.
        """
        start, own = self.losses.get(START, {}), self.losses.get(incumbent, {})
        if incumbent == START:
            return start.get(0, self.mean(START))
        moved = [own[seed] + start[0] - start[seed] for seed in own if {0, seed} <= start.keys()]
        return sum(moved) / len(moved) if moved else self.mean(incumbent)

    def allowance(self) -> float:
        """Nats that a run may lie above `bar` by noise; 0 while the noise is not known."""
        deviation = self.noise.paired().deviation
        return self.rules.allowance * math.sqrt(2) * deviation if math.isfinite(deviation) else 0.0

    def enter(self, point: int, replicate: int, loss: float) -> None:
        """Adds a run of `point`, unless it diverged."""
        if not math.isfinite(loss):
            return
        losses = {**self.losses.get(point, {}), replicate: loss}
        # A repetition off the cliff is no sample of the noise, whichever came first.
        edge = min(losses.values()) + self.rules.cliff
        self.losses[point] = {key: value for key, value in losses.items() if value <= edge}
        self.noise.replace(point, self.losses[point])

    def missing(self, point: int, replicates: int) -> tuple[tuple[int, int], ...]:
        """Enters `point`'s runs before number `replicates`; the names of those not yet ended."""
        # A challenger's run 0 was chosen for its low loss, unless nothing else will be run.
        first = 0 if point == START or self.rules.confirm == 0 else 1
        wanted = range(self.attempts.get(point, first), replicates)
        lacking = tuple((point, run) for run in wanted if (point, run) not in self.ended)
        if not lacking:
            for run in wanted:
                self.enter(point, run, self.ended[point, run])
            self.attempts[point] = max(replicates, self.attempts.get(point, first))
        return lacking

    def challenge(self, challenger: int, incumbent: int) -> bool | tuple[tuple[int, int], ...]:
        """Whether `challenger` takes over, or the runs needed to tell.

        Both run the same seeds, one after the other, since most challengers are no better: it stops
        as soon as the fresh runs show no gain, or one of `guard` standard errors. After `confirm`
        runs in between, the incumbent stays. A fresh run off the cliff rejects at once. While the
        noise on equal seeds is not known, for want of points with several runs, only a loss of
        `guard` standard errors stops it.
        """
        for step in range(1, max(1, self.rules.confirm) + 1):
            replicates = step + 1 if self.rules.confirm else 1
            lacking = self.missing(challenger, replicates)
            if self.rules.confirm:
                lacking += self.missing(incumbent, replicates)
            if lacking:
                return lacking
            if len(self.losses.get(challenger, {})) < step:
                return False
            if incumbent not in self.losses:
                return True
            gain = self.noise.gain(challenger, over=incumbent)
            surely = self.rules.guard * gain.standard_error
            if gain.nats > 0 and (self.rules.guard == 0 or gain.nats > surely):
                return True
            if gain.nats <= 0 and (self.noise.knows_seeds or gain.nats < -surely):
                return False
        return False


def fold(runs: Sequence[Run], rules: Rules) -> State:
    """The state of a search after `runs`, in any order."""
    runs = sorted(runs, key=attrgetter("slot"))
    books = _Books(_ended(runs, rules), rules)
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
