"""What counts as a spike, and what the policies decide."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from megatron_completedp.config.sections import DivergenceConfig, TrainingConfig
from megatron_completedp.errors import ConfigError, TrainingDiverged
from megatron_completedp.train.divergence import Guard


def guard(*losses: float, **config: Any) -> Guard:
    made = Guard(DivergenceConfig(**{"on_spike": "skip", "spike_window": 3, **config}))
    for loss in losses:
        made.accept(loss)
    return made


def error(cause: Any) -> TrainingDiverged:
    return TrainingDiverged("step 9: the loss is odd.", cause=cause)


def test_the_limit_is_the_median_of_the_window_plus_the_tolerance() -> None:
    assert guard(9.0, 4.0, 2.0, 3.0, spike_nats=0.5).loss_limit == 3.5
    assert guard(2.0, 3.0, 1e9, spike_nats=0.5).loss_limit == 3.5, "one high loss moves nothing"


def test_there_is_no_limit_before_the_window_is_full() -> None:
    assert guard(4.0, 2.0).loss_limit == math.inf
    assert guard(4.0, 2.0, 3.0).loss_limit == 4.0


def test_there_is_no_limit_where_spikes_are_ignored() -> None:
    assert guard(4.0, 2.0, 3.0, on_spike="ignore").loss_limit == math.inf


@pytest.mark.parametrize(
    ("config", "cause", "action"),
    [
        ({}, "nonfinite", "stop"),
        ({"on_nonfinite": "skip"}, "nonfinite", "skip"),
        ({"on_nonfinite": "skip"}, "spike", "rollback"),
        ({"on_nonfinite": "rollback"}, "validation", "rollback"),
        ({"on_nonfinite": "skip"}, "validation", "stop"),
        ({"on_spike": "stop"}, "spike", "stop"),
    ],
)
def test_the_cause_chooses_the_policy(config: dict[str, Any], cause: str, action: str) -> None:
    made = guard(**{"on_spike": "rollback", **config})
    assert made.decide(error(cause), can_roll_back=True)[0] == action
    assert made.events == (action != "stop")


def test_rolling_back_needs_a_checkpoint() -> None:
    action, reason = guard(on_nonfinite="rollback").decide(error("nonfinite"), can_roll_back=False)
    assert action == "stop"
    assert reason == "There is no checkpoint to roll back to. "


def test_one_event_more_than_allowed_stops() -> None:
    made = guard(on_nonfinite="skip", on_spike="rollback", max_events=2)
    assert made.decide(error("nonfinite"), can_roll_back=True) == (
        "skip",
        "Skipped the update (1 of at most 2).",
    )
    assert made.decide(error("spike"), can_roll_back=True)[0] == "rollback"
    action, reason = made.decide(error("nonfinite"), can_roll_back=True)
    assert action == "stop"
    assert "divergence.max_events = 2" in reason


def test_a_restored_guard_decides_the_same() -> None:
    made = guard(4.0, 2.0, 3.1, on_nonfinite="skip", max_events=1)
    made.decide(error("nonfinite"), can_roll_back=True)
    again = guard(9.0, on_nonfinite="skip", max_events=1)
    again.restore(json.loads(json.dumps(made.state())))
    assert again.loss_limit == made.loss_limit
    assert again.decide(error("nonfinite"), can_roll_back=True)[0] == "stop"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("spike_nats", 0.0, "expected a positive number of nats"),
        ("spike_nats", math.nan, "expected a positive number of nats"),
        ("spike_window", 0, "expected at least 1"),
        ("max_events", -1, "expected at least 0"),
    ],
)
def test_bad_policies(name: str, value: float, expected: str) -> None:
    with pytest.raises(ConfigError, match=rf"divergence.{name} is {value}; {expected}"):
        DivergenceConfig(**{name: value})


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_bad_timeouts(value: float) -> None:
    with pytest.raises(ConfigError, match=rf"training.timeout_s is {value}; expected a positive"):
        TrainingConfig(global_batch_size=1, train_steps=1, timeout_s=value)
