"""Schedules: values by hand, continuity, floor, and dependence on step / steps alone."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from core_cases import quick
from hypothesis import given
from hypothesis import strategies as st

from megatron_completedp.core.schedule import SCHEDULE_KINDS, Schedule
from megatron_completedp.errors import ConfigError

schedules = st.builds(
    Schedule,
    kind=st.sampled_from(SCHEDULE_KINDS),
    warmup_fraction=st.sampled_from([0.0, 0.02, 0.1, 0.5]),
    decay_fraction=st.floats(0.05, 0.5),
    min_lr_fraction=st.floats(0, 1),
)


@pytest.mark.parametrize(
    ("kind", "step", "value"),
    [
        # Warmup 10 of 100 steps, floor 0.1. The rise is the same for every kind.
        *[(kind, 0, 0.0) for kind in SCHEDULE_KINDS],
        *[(kind, 5, 0.5) for kind in SCHEDULE_KINDS],
        *[(kind, 10, 1.0) for kind in SCHEDULE_KINDS],
        ("cosine", 40, 0.775),  # a third of the fall: cos(60 degrees) = 0.5
        ("cosine", 55, 0.55),
        ("cosine", 100, 0.1),
        ("linear", 28, 0.82),  # a fifth of the fall
        ("linear", 55, 0.55),
        ("linear", 100, 0.1),
        ("wsd", 50, 1.0),
        ("wsd", 80, 1.0),
        ("wsd", 90, 0.55),
        ("wsd", 100, 0.1),
        ("constant", 50, 1.0),
        ("constant", 100, 1.0),
        # Past the end nothing falls below the floor.
        ("cosine", 150, 0.1),
        ("linear", 150, 0.1),
        ("wsd", 150, 0.1),
    ],
)
def test_values_by_hand(kind: str, step: int, value: float) -> None:
    schedule = Schedule(kind=kind, warmup_fraction=0.1, decay_fraction=0.2, min_lr_fraction=0.1)
    assert schedule.at(step, 100) == pytest.approx(value, rel=1e-12)


def test_without_warmup_the_first_update_has_the_peak() -> None:
    assert Schedule(warmup_fraction=0.0).at(0, 10) == 1.0


@quick
@given(schedules, st.integers(0, 500), st.integers(1, 500), st.integers(1, 64))
def test_depends_on_the_fraction_alone(schedule: Schedule, step: int, steps: int, k: int) -> None:
    """Exactly: the quotient of two integers is rounded once, so (k s) / (k n) is s / n."""
    assert schedule.at(k * step, k * steps) == schedule.at(step, steps)


@quick
@given(schedules)
def test_continuous(schedule: Schedule) -> None:
    """No step of 1/n exceeds the steepest slope over n; a jump at a joint would."""
    n = 400
    rise = 1 / schedule.warmup_fraction if schedule.warmup_fraction else 0.0
    drop = 1 - schedule.min_lr_fraction
    # A half cosine over the shortest possible span is the steepest fall but for wsd's own.
    fall = drop * max(math.pi / 2 / (1 - schedule.warmup_fraction), 1 / schedule.decay_fraction)
    rates = [schedule.at(step, n) for step in range(n + 1)]
    largest = max(abs(a - b) for a, b in pairwise(rates))
    assert largest <= max(rise, fall) / n + 1e-12  # rounding of rates near 1


@quick
@given(schedules)
def test_stays_between_floor_and_peak_after_warmup(schedule: Schedule) -> None:
    rates = [schedule.at(step, 100) for step in range(51, 140)]
    # The floor is reached as floor + (1 - floor) * 0; one rounding may pass it.
    assert all(schedule.min_lr_fraction * (1 - 1e-12) <= rate <= 1 for rate in rates)
    if schedule.kind != "constant":
        assert rates[-1] == pytest.approx(schedule.min_lr_fraction, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("percent", range(100))
def test_warmup_and_decay_may_fill_the_whole_run(percent: int) -> None:
    """0.32 + 0.68 is the whole run, though 1 - 0.32 rounds to less than 0.68."""
    Schedule(kind="wsd", warmup_fraction=percent / 100, decay_fraction=(100 - percent) / 100)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "cosin"}, "schedule.kind is 'cosin'; expected one of cosine, linear, wsd"),
        ({"warmup_fraction": -0.1}, r"warmup_fraction is -0.1; expected a fraction in \[0, 1\]"),
        ({"min_lr_fraction": 1.5}, r"min_lr_fraction is 1.5; expected a fraction in \[0, 1\]"),
        ({"min_lr_fraction": math.nan}, "min_lr_fraction is nan"),
        ({"warmup_fraction": 1.0}, "the whole run would be warmup"),
        (
            {"kind": "wsd", "warmup_fraction": 0.5, "decay_fraction": 0.6},
            "decay_fraction is 0.6 with warmup_fraction 0.5; .* a sum of at most 1",
        ),
        ({"kind": "wsd", "decay_fraction": 0.0}, "decay_fraction is 0.0"),
    ],
)
def test_bad_schedules_name_the_value(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Schedule(**fields)
