"""What `search run` says while its workers train: each trial that has ended."""

from __future__ import annotations

import logging

from optuna.trial import FrozenTrial, TrialState

from megatron_completedp.search.attributes import SECONDS
from megatron_completedp.search.ledger import end_of
from megatron_completedp.search.outage import FAILURES, persist
from megatron_completedp.search.queue import Queue
from megatron_completedp.search.settings import DatabaseSettings

logger = logging.getLogger(__name__)


class Progress:
    """What the parent logs: each trial that has ended since it last looked."""

    def __init__(self, queue: Queue, database: DatabaseSettings) -> None:
        """What had ended before is not logged. Waits for the database like `persist`."""
        self._queue = queue
        self._seen = {trial.number for trial in persist(self._ended, database)}

    def look(self) -> bool:
        """Whether a trial has ended; not known while the database is away."""
        try:
            ended = self._ended()
        except FAILURES:
            return False
        new = [trial for trial in ended if trial.number not in self._seen]
        for trial in new:
            self._seen.add(trial.number)
            count = sum(each.state != TrialState.FAIL for each in ended)
            logger.info("%d of %d: %s", count, self._queue.trials, line(trial))
        return bool(new)

    def _ended(self) -> list[FrozenTrial]:
        trials = self._queue.study.get_trials(deepcopy=False)
        return [trial for trial in trials if trial.state.is_finished()]


def line(trial: FrozenTrial) -> str:
    """A trial, and how it ended."""
    end = end_of(trial)
    how = f"{trial.value:.4f}" if end == "finished" else end
    return f"trial {trial.number} {how}  ({trial.user_attrs.get(SECONDS, 0):.0f} s)"
