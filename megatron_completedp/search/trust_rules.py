"""The rules of the trust-region search, and the names of its points."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from megatron_completedp.errors import ConfigError

#: The point that a search starts from. A child is named by the slot that first ran it.
START = -1


def step_after(number: int) -> int:
    """The name of the point that a step after round `number`, counted from 0, leads to."""
    return START - 1 - number


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What the search does; each rule can be switched off for an ablation.

    The paper (arXiv 2512.22382) describes a trust-region random search and publishes no numbers of
    it; the defaults are ours, and say why.
    """

    round_size: int = 16
    """Children per round. At least the number of workers: else rounds overlap, and those that were
    drawn before the last decision say nothing about the region. More children per round make a
    better model, fewer make steps more often."""
    linear_step: bool = True
    """After a round, try a step of the region's size down a linear model of the children near the
    incumbent. It challenges the incumbent, or else the best child below that does. Off (an
    ablation, with a `subset` of a quarter), the best child alone does. Among dozens of coordinates
    the best of a few children is hardly better than their centre, since what it gains in some it
    pays for in others; the model adds up what all of them say about each."""
    start_replicates: int = 3
    """Runs of the start, from which the noise is first estimated: 2 degrees of freedom, which each
    challenge adds to. 1 for an objective without noise."""
    confirm: int = 3
    """Most fresh runs of a challenger. Its first run was chosen for being low, or its step for the
    losses of that seed: it is biased low and not used; 0 trusts it nevertheless (an ablation)."""
    guard: float = 2.0
    """Standard errors by which a challenger must win on equal seeds; 0 takes any lower mean."""
    cliff: float = 1.0
    """Nats above which a run is off a cliff: above its point's lowest run it is never averaged,
    above the round's lowest child no part of the model, above the incumbent none of the centre. Its
    value says that something broke, not how good the point is. 100, say, for no cliffs."""
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
