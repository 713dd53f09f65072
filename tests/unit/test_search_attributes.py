"""What a study's attributes say of a trial."""

from __future__ import annotations

import math
from typing import Any

import pytest

pytest.importorskip("optuna")

from optuna.trial import FrozenTrial, TrialState, create_trial

from megatron_completedp.search.attributes import (
    DIVERGED,
    FIRST_TRY,
    REPLICATE,
    ended_well,
    is_repetition,
    replicate_of,
)


def trial(**how: Any) -> FrozenTrial:
    return create_trial(**how)


def test_only_a_finite_value_that_did_not_diverge_ended_well() -> None:
    assert ended_well(trial(value=3.0))
    assert ended_well(trial(value=3.0, user_attrs={DIVERGED: False}))
    assert not ended_well(trial(value=6.2, user_attrs={DIVERGED: True}))
    assert not ended_well(trial(value=math.inf))
    for state in (TrialState.RUNNING, TrialState.WAITING, TrialState.FAIL, TrialState.PRUNED):
        assert not ended_well(trial(state=state))


def test_a_trial_is_the_first_run_of_its_point_unless_it_says_otherwise() -> None:
    assert replicate_of(trial(value=3.0)) == 0
    assert replicate_of(trial(value=3.0, user_attrs={REPLICATE: 2})) == 2


def test_a_repetition_names_the_first_try_number_0_too() -> None:
    assert is_repetition(trial(state=TrialState.WAITING, system_attrs={FIRST_TRY: 0}))
    assert not is_repetition(trial(state=TrialState.WAITING))
