"""What is written down in a study and its trials: the attributes' names, and what they say.

The names are in every study that was ever kept: another name would make those unreadable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from optuna.trial import FrozenTrial, Trial, TrialState

# Of the study.

#: What its values mean, and how its trials are proposed.
IDENTITY = "identity"
#: Hashes of the token files.
TEXT = "text"
#: Id of the output folder that its workers share.
FOLDER_ID = "folder"
#: The versions of this package that worked on it.
CODE = "code"

# Of a trial, read by samplers.

#: User attribute: which run of its point it is. The objective makes another seed of it.
REPLICATE = "replicate"
#: User attribute by which an objective says that a run diverged, whatever its value.
DIVERGED = "diverged"
#: System attribute: what the trust region runs in it, and where its point was drawn from.
TAG = "trust_region"
#: System attribute of an enqueued trial, Optuna's: the parameters that it was given.
FIXED = "fixed_params"
#: System attribute of a trial that repeats others, Optuna's: the number of the first of them.
FIRST_TRY = "failed_trial"
#: System attribute of a trial that repeats others, Optuna's: the numbers of all of them.
EARLIER_TRIES = "retry_history"

# User attributes of a trial, written by its worker.

#: Name of the trial's run folders.
FOLDER = "folder"
#: Who trains it: written once the try has all that it needs.
WORKER = "worker"
#: Steps that the try found made, by run, and did not repeat.
KEPT = "kept_steps"
#: A signal ended this try, and its run was saved. It counts for no retry.
STOPPED = "stopped"
#: The point that it was enqueued with is none of the space: it was not trained, and never will be.
REFUSED = "refused"
#: What the try cost; these and the others are the fields of `objective.Cost`.
SECONDS, FLOPS = "seconds", "flops"


def is_diverged(trial: FrozenTrial) -> bool:
    """Whether the objective said so; a value that is not finite says it, too, but not here."""
    return bool(trial.user_attrs.get(DIVERGED))


def ended_well(trial: FrozenTrial) -> bool:
    """Whether its value is a loss of its point: it completed, finite, and did not diverge."""
    if trial.state != TrialState.COMPLETE or trial.value is None:
        return False
    return math.isfinite(trial.value) and not is_diverged(trial)


def was_stopped(trial: FrozenTrial) -> bool:
    """Whether a signal ended this try: another goes on with its run."""
    return trial.state == TrialState.FAIL and bool(trial.user_attrs.get(STOPPED))


def replicate_of(trial: FrozenTrial | Trial) -> int:
    """Which run of its point it is; 0, the first, where nothing is written."""
    return int(trial.user_attrs.get(REPLICATE, 0))


def is_repetition(trial: FrozenTrial) -> bool:
    """Whether it repeats a try that was stopped or lost, and so is no trial of its own."""
    return FIRST_TRY in trial.system_attrs


def earlier_tries(trial: FrozenTrial) -> list[int]:
    """Numbers of the tries that this trial repeats, the first one first."""
    return list(trial.system_attrs.get(EARLIER_TRIES, ()))


def lost(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The failed ones that no other repeats, but for those that were refused."""
    over = {number for trial in trials for number in earlier_tries(trial)}
    over |= {trial.number for trial in trials if trial.user_attrs.get(REFUSED)}
    return [
        trial for trial in trials if trial.state == TrialState.FAIL and trial.number not in over
    ]


def folder_of(trial: FrozenTrial | Trial) -> str:
    """Name of its run folders."""
    return str(trial.user_attrs.get(FOLDER, f"{trial.number:04d}"))
