"""What a trust-region search decided on, and whether a challenger takes over."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_completedp.search.seed_noise import SeedNoise, near_lowest
from megatron_completedp.search.trust_rules import START, Rules


@dataclass
class Books:
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
        """What children are held to: the incumbent's loss on their seed.

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
        self.losses[point] = near_lowest(losses, self.rules.cliff)
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
