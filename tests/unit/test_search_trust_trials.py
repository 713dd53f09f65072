"""A study's trials as runs: which of them have ended, and how."""

from __future__ import annotations

from typing import Any

import pytest

optuna = pytest.importorskip("optuna")

from optuna.distributions import FloatDistribution  # noqa: E402
from optuna.trial import TrialState  # noqa: E402

from megatron_completedp.search.attributes import STOPPED  # noqa: E402
from megatron_completedp.search.trust_region import TrustRegionSampler  # noqa: E402

SPACE = {"a": FloatDistribution(-1, 1)}


def studied() -> Any:
    sampler = TrustRegionSampler(space=SPACE, round_size=2, start_replicates=2)
    return optuna.create_study(sampler=sampler)


def test_a_run_that_a_signal_stopped_has_not_ended() -> None:
    """A status between the stop and the repetition must not take it for diverged."""
    study = studied()
    for _ in range(4):  # the start twice, and two children
        study.tell(study.ask(SPACE), 1.0)
    ((step, replicate),) = wanted = study.sampler.state(study).wanted
    stopped: Any = study.ask(SPACE)
    stopped.set_user_attr(STOPPED, True)
    study.tell(stopped, state=TrialState.FAIL)
    state = study.sampler.state(study)
    assert (state.wanted, state.rounds) == (wanted, ())
    # Negative control: the same run, failed for good, is decided on.
    other = studied()
    other.add_trials(study.get_trials()[:4])
    assert other.sampler.state(other).wanted == ((step, replicate),)
    other.tell(other.ask(SPACE), state=TrialState.FAIL)
    assert len(other.sampler.state(other).rounds) == 1
