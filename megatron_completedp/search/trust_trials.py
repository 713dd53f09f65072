"""A study's trials as the runs of a trust-region search."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field

import optuna
from optuna.trial import FrozenTrial, TrialState

from megatron_completedp.search.attributes import FIRST_TRY, REPLICATE, TAG, ended_well, was_stopped
from megatron_completedp.search.trust_state import Run


@dataclass(frozen=True)
class Trials:
    """What a study holds, but for one trial."""

    runs: list[Run]
    """One per slot."""
    by_slot: dict[int, FrozenTrial]
    own: int
    """The slot of the trial left out; of the next new trial, if none was."""

    def trial_of(self, point: int) -> FrozenTrial | None:
        """A trial that ran `point`, a child or a step; None where none has been asked to."""
        if point >= 0:
            return self.by_slot[point]
        return next((self.by_slot[run.slot] for run in self.runs if run.point == point), None)


@dataclass
class Reader:
    """Reads studies; remembers finished trials only to be fast.

    Storages hand out a finished trial as the same object every time. What is remembered is only
    used for that very object, so it cannot be another study's or an older version.
    """

    _known: dict[int, tuple[FrozenTrial, Run]] = field(default_factory=dict)

    def read(self, study: optuna.Study, names: Collection[str], without: int = -1) -> Trials:
        """The study's trials but number `without`, `names` being the parameters searched.

        A slot is a trial's place among those that do not retry another, so a retry has that of the
        trial it repeats. A slot's trial is the completed one, else the one that still may complete,
        else the last that failed.
        """
        sign = -1 if study.direction == optuna.study.StudyDirection.MAXIMIZE else 1
        slot_of: dict[int, int] = {}
        by_slot: dict[int, FrozenTrial] = {}
        runs: dict[int, Run] = {}
        slots = 0
        for trial in study.get_trials(deepcopy=False):
            number = trial.number
            known = self._known.get(number)
            remembered = known is not None and known[0] is trial
            retry_of = None if remembered else trial.system_attrs.get(FIRST_TRY)
            slot = slots if retry_of is None else slot_of[retry_of]
            slots += retry_of is None
            slot_of[number] = slot
            if number == without:
                continue
            if slot in by_slot and _rank(by_slot[slot]) > _rank(trial):
                continue
            by_slot[slot] = trial
            if known is not None and remembered:
                runs[slot] = known[1]
                continue
            runs[slot] = run = _run(slot, trial, sign, names)
            # A retry's slot and a foreign trial's loss depend on more than the trial.
            if retry_of is None and TAG in trial.system_attrs and trial.state.is_finished():
                self._known[number] = (trial, run)
        own = slot_of.get(without, slots)
        # Earlier failed tries of the trial left out have its slot; they are no runs of their own.
        runs.pop(own, None)
        return Trials(list(runs.values()), by_slot, own)


def _rank(trial: FrozenTrial) -> int:
    if trial.state == TrialState.COMPLETE:
        return 2
    return 0 if trial.state.is_finished() else 1


def _run(slot: int, trial: FrozenTrial, sign: int, names: Collection[str]) -> Run:
    """`trial` as the fold sees it; losses are minimized."""
    tag = trial.system_attrs.get(TAG)
    loss: float | None = None
    # What others ran without some of the parameters is no point of this space.
    here = tag is not None or all(name in trial.params for name in names)
    if here and ended_well(trial):
        assert trial.value is not None, "it ended well"
        loss = sign * trial.value
    elif trial.state.is_finished() and not was_stopped(trial):
        loss = math.inf
    if tag is None:
        return Run(slot, slot, 0, loss)
    centre = tuple(tag["centre"]) if "centre" in tag else None
    return Run(slot, tag["point"], tag[REPLICATE], loss, centre, tag.get("scale", 1.0))
