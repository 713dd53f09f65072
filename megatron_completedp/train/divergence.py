"""Which losses are spikes, and what a run does about a step that went wrong.

Decisions are functions of losses and counts that are equal on every rank and are saved with every
checkpoint, so that all ranks decide alike and a resumed run decides as if it had not stopped.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any, Literal

from megatron_completedp.config.sections import DivergenceConfig
from megatron_completedp.errors import TrainingDiverged

Action = Literal["stop", "skip", "rollback"]


class Guard:
    """Watches the losses of one run and counts what was skipped or rolled back."""

    def __init__(self, config: DivergenceConfig) -> None:
        self.config = config
        self.events = 0
        """Skips and rollbacks since the run began."""
        self._losses: deque[float] = deque(maxlen=config.spike_window)

    @property
    def loss_limit(self) -> float:
        """The loss, in nats per token, above which the next step is a spike.

        median(last spike_window losses) + spike_nats. The median does not move with a few high
        losses, as a mean would. Infinite where spikes are ignored and until the window is full.
        """
        if self.config.on_spike == "ignore" or len(self._losses) < self.config.spike_window:
            return math.inf
        return median(self._losses) + self.config.spike_nats

    def accept(self, loss: float) -> None:
        """Count the loss of an update that was applied."""
        self._losses.append(loss)

    def decide(self, error: TrainingDiverged, *, can_roll_back: bool) -> tuple[Action, str]:
        """What to do about `error`, and the reason where the policy alone does not say it.

        Other policies become stop when max_events are used up, when there is no checkpoint to roll
        back to, and when there is no update to skip.
        """
        config = self.config
        action = config.on_spike if error.cause == "spike" else config.on_nonfinite
        assert action != "ignore", "loss_limit is infinite then"
        if action == "stop":
            return "stop", ""
        if action == "rollback" and not can_roll_back:
            return "stop", "There is no checkpoint to roll back to. "
        if action == "skip" and error.cause == "validation":
            return "stop", "There is no update to skip. "
        if self.events == config.max_events:
            return "stop", (
                f"The run has used up its divergence.max_events = {self.events} skips and "
                "rollbacks. "
            )
        self.events += 1
        done = "Skipped the update" if action == "skip" else "Rolled back"
        return action, f"{done} ({self.events} of at most {config.max_events})."

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as JSON values."""
        return {"losses": list(self._losses), "events": self.events}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up `state`, written by this version under any configuration."""
        self._losses.clear()
        self._losses.extend(state["losses"])
        self.events = state["events"]
