"""Which trial a worker gets next: a new one, or one whose worker was stopped, killed or lost.

A worker holds the lock of its trial (in the output folder) until the trial has its result. The lock
goes with the process, so whoever asks next sees at once that a trial has nobody left; where a lock
outlives its machine, the study's heartbeats say it. Such a trial fails, and another repeats it:
same point, same folder. All that is decided is in the study, and a decision that was interrupted
is taken again.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from megatron_completedp.data.claims import claim
from megatron_completedp.errors import ConfigError
from megatron_completedp.search.attributes import (
    EARLIER_TRIES,
    FIRST_TRY,
    FIXED,
    FOLDER,
    KEPT,
    REFUSED,
    STOPPED,
    WORKER,
    earlier_tries,
    folder_of,
    is_repetition,
    lost,
    replicate_of,
    was_stopped,
)
from megatron_completedp.search.bulk import write_attributes
from megatron_completedp.search.objective import Cost, Facts, Objective, kept_steps, last_step
from megatron_completedp.search.proposal import propose
from megatron_completedp.train.folder import METRICS_FILE

logger = logging.getLogger(__name__)

#: User attributes of a try that are not its repetition's.
OF_ONE_TRY = {STOPPED, KEPT, WORKER, *Cost.__dataclass_fields__}


@dataclass(frozen=True)
class Taken:
    """A trial to train."""

    trial: optuna.Trial
    params: Mapping[str, float]
    name: str
    """Of its run folders."""
    replicate: int
    """Which run of its point this is."""


@dataclass(frozen=True)
class Queue:
    """The trials of one study, as one worker sees them."""

    study: optuna.Study
    storage: RDBStorage
    sampler: Callable[[int], optuna.samplers.BaseSampler]
    """Who proposes the trial of a slot: its place among those that repeat no other."""
    objective: Objective
    out: Path
    trials: int
    """To be begun, repetitions left out."""
    retries: int
    """Of a trial whose workers died."""
    worker: str
    silent_since: dict[int, float] = field(default_factory=dict)
    """When this worker first saw a running trial without signs of life; by the trial's id."""

    def take(self, held: ExitStack) -> Taken | None:
        """The next trial, its lock entered into `held`; None while there is none to begin.

        May be called again after a failure of the database.
        """
        with claim(self.out / "claims" / "ask", wait=True):
            trials = self._repaired()
            waiting = [trial for trial in trials if trial.state == TrialState.WAITING]
            if not waiting and begun(trials) >= self.trials:
                return None
            first = waiting[0].system_attrs.get(FIRST_TRY) if waiting else None
            self.study.sampler = self.sampler(begun(trials[:first]))
            space = self.objective.space.distributions()
            trial, params = propose(self.study, self.storage, space)
            taken = Taken(trial, params, folder_of(trial), replicate_of(trial))
            runs = self.objective.configs(params, name=taken.name, replicate=taken.replicate)
            kept = [kept_steps(config) for _, config in runs]
            write_attributes(self.storage, trial._trial_id, {WORKER: self.worker, KEPT: kept})
            # Last: where anything above fails, the trial has no lock, and is repeated.
            held.enter_context(claim(self._lock(trial.number), wait=True))
        return taken

    def finished(self) -> bool:
        """Whether every trial has ended, so that no worker will be needed again."""
        with claim(self.out / "claims" / "ask", wait=True):
            trials = self._repaired()
        return begun(trials) >= self.trials and all(t.state.is_finished() for t in trials)

    def given_up(self, trials: Sequence[FrozenTrial]) -> list[int]:
        """Numbers of the last tries of trials that were lost too often to be repeated again."""
        return [each.number for each in lost(trials) if not self._may_repeat(each, trials)]

    def complete(
        self, taken: Taken, facts: Facts, curve: Mapping[int, float] = MappingProxyType({})
    ) -> None:
        """Enter the result, and the training losses that the pruner read, by step.

        May be called again after a failure of the database.
        """
        value = self.objective.value(facts)
        self._end(taken, asdict(facts), TrialState.COMPLETE, value=value, curve=curve)

    def prune(self, taken: Taken, cost: Cost, curve: Mapping[int, float]) -> None:
        """The run fell behind and was stopped; the trial has ended."""
        self._end(taken, asdict(cost), TrialState.PRUNED, curve=curve)

    def give_back(self, taken: Taken, cost: Cost) -> None:
        """A signal ended the try; whoever asks next goes on with its run."""
        self._end(taken, {STOPPED: True, **asdict(cost)}, TrialState.FAIL)

    def fail(self, taken: Taken) -> None:
        """An error ended the try, which counts like a worker's death: `retries` are its limit."""
        trial = self.storage.get_trial(taken.trial._trial_id)
        # A sampler takes it for diverged; one that is asked now must see its repetition instead.
        with claim(self.out / "claims" / "ask", wait=True):
            self._end(taken, asdict(self._cost_of_dead(trial)), TrialState.FAIL)

    def _end(
        self,
        taken: Taken,
        attributes: Mapping[str, Any],
        state: TrialState,
        *,
        value: float | None = None,
        curve: Mapping[int, float] = MappingProxyType({}),
    ) -> None:
        trial = taken.trial
        try:
            for step, loss in curve.items():
                trial.report(loss, step)
            write_attributes(self.storage, trial._trial_id, attributes)
            # Not `study.tell`, which reads the trial twice and asks a sampler that has no say here.
            values = None if value is None else [value]
            self.storage.set_trial_state_values(trial._trial_id, state, values)
        except UpdateFinishedTrialError:
            # Ended before: by this call, whose answer was lost, or as its heartbeats were.
            logger.warning("trial %d had ended already; another may repeat it", trial.number)

    def _lock(self, number: int) -> Path:
        return self.out / "claims" / f"trial-{number}"

    def _repaired(self) -> Sequence[FrozenTrial]:
        """All trials, once those without a worker are failed, and the failed ones repeated.

        Those that wait with a point that is none of the space are refused. Under the claim on
        asking.
        """
        for trial_id in self._silent():
            self._fail(self.storage.get_trial(trial_id))
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            with claim(self._lock(trial.number), wait=False) as free:
                if free:
                    self._fail(trial)
        trials = self.study.get_trials(deepcopy=False)
        waiting = [trial for trial in trials if trial.state == TrialState.WAITING]
        bad = [trial for trial in waiting if self._fault(trial)]
        for trial in bad:
            self._fail(trial)
        left = [trial for trial in lost(trials) if self._may_repeat(trial, trials)]
        for trial in left:
            self._repeat(trial)
        return self.study.get_trials(deepcopy=False) if left or bad else trials

    def _silent(self) -> list[int]:
        """Ids of the running trials without a sign of life, as this worker has known a while.

        After an outage all are without, the living too, until they write again: what only now
        looks silent gets one more heartbeat. One whose lock is free needs no such patience.
        """
        now, known = time.monotonic(), self.silent_since
        silent = self.storage._get_stale_trial_ids(self.study._study_id)
        since = {trial_id: known.get(trial_id, now) for trial_id in silent}
        known.clear()
        known.update(since)
        patience = self.storage.get_heartbeat_interval() or 0
        return [trial_id for trial_id in silent if now - since[trial_id] > patience]

    def _fail(self, trial: FrozenTrial) -> None:
        """End a trial whose worker is gone, with what its try cost as far as its folder tells.

        One whose point cannot be trained is refused: it is not repeated.
        """
        fault = self._fault(trial)
        end = {REFUSED: True} if fault else asdict(self._cost_of_dead(trial))
        with suppress(UpdateFinishedTrialError):  # its worker did, between our look and our lock
            write_attributes(self.storage, trial._trial_id, end)
            self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
            worker = f"lost its worker, {trial.user_attrs.get(WORKER, 'new')}"
            refused = f"was enqueued by hand and is refused: {fault}"
            logger.warning("trial %d %s", trial.number, refused if fault else worker)

    def _fault(self, trial: FrozenTrial) -> str | None:
        """What is wrong with the point that a trial was enqueued with; None for nothing."""
        try:
            self.objective.space.check({**trial.system_attrs.get(FIXED, {}), **trial.params})
        except ConfigError as error:
            return str(error)
        return None

    def _cost_of_dead(self, trial: FrozenTrial) -> Cost:
        """Of the runs that it came to: steps beyond those kept, and seconds to the last metrics."""
        name, replicate = folder_of(trial), replicate_of(trial)
        runs = list(self.objective.configs(trial.params, name=name, replicate=replicate))
        kept = trial.user_attrs.get(KEPT, [0] * len(runs))
        begun_at = trial.datetime_start.timestamp() if trial.datetime_start else math.inf
        steps, seconds = 0, 0.0
        for (_, config), before in zip(runs, kept, strict=True):
            file = Path(config.run_dir) / METRICS_FILE
            since = file.stat().st_mtime - begun_at if file.exists() else -1.0
            if since >= 0:  # else what is there is of earlier tries
                steps += max(last_step(config) - before, 0)
                seconds = max(seconds, since)
        return self.objective.cost(steps, seconds)

    def _may_repeat(self, trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> bool:
        """Whether fewer tries of it than `retries` + 1 died.

        Stopped ones do not count, nor those that no worker came to train: those ended while they
        were asked for, as in an outage, and say nothing of the trial.
        """
        tries = [trial, *(trials[number] for number in earlier_tries(trial))]
        died = [each for each in tries if WORKER in each.user_attrs and not was_stopped(each)]
        return len(died) <= self.retries

    def _repeat(self, trial: FrozenTrial) -> None:
        """Enqueue the repetition of a failed trial."""
        earlier = [*earlier_tries(trial), trial.number]
        kept = {key: v for key, v in trial.user_attrs.items() if key not in OF_ONE_TRY}
        with claim(self._lock(trial.number), wait=False) as free:
            # Whoever was lost without losing its lock may still write into its folder.
            done = free or was_stopped(trial)
            name = folder_of(trial) if done else f"{folder_of(trial)}-again{len(earlier)}"
        self.study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.WAITING,
                params=trial.params,
                distributions=trial.distributions,
                user_attrs={**kept, FOLDER: name},
                system_attrs={
                    **trial.system_attrs,
                    FIRST_TRY: earlier[0],
                    EARLIER_TRIES: earlier,
                },
            )
        )
        logger.info("trial %d is repeated, from its folder %s", trial.number, name)


def begun(trials: Sequence[FrozenTrial]) -> int:
    """How many trials there are without repetitions."""
    return sum(not is_repetition(trial) for trial in trials)
