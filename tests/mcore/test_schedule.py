"""Megatron's scheduler, as this package sets it up, against the schedule's own function."""

from __future__ import annotations

import pytest

from megatron_completedp.core.schedule import Schedule, ScheduleKind
from megatron_completedp.mcore.engine import Engine
from megatron_completedp.mcore.optimizer import build_optimizer, build_scheduler
from megatron_completedp.mcore.platform import Platform
from megatron_completedp.plan.run_plan import Plan
from tests.mcore.engine_runs import run_config

#: Lengths that the fractions below divide, and that they do not.
LENGTHS = (1, 7, 20, 101)


@pytest.fixture(scope="module")
def engine(platform: Platform) -> Engine:
    config = run_config()
    return Engine(config, Plan.of(config).resolved, platform)


def fractions(engine: Engine, schedule: Schedule, steps: int) -> list[float]:
    """The one group's learning rate, the fraction of every module's peak, before each update."""
    optimizer = build_optimizer(
        engine.chunks,
        engine.parameters,
        engine.groups,
        precision=engine.config.training.precision,
        parallel=engine.config.parallel,
        schedule=schedule,
    )
    scheduler = build_scheduler(optimizer, schedule, steps)
    seen = []
    for _ in range(steps):
        (group,) = optimizer.param_groups
        assert group["weight_decay"] == 0, "decay is in the table of values, and only there"
        seen.append(group["lr"])
        scheduler.step(1)
    return seen


@pytest.mark.parametrize("steps", LENGTHS)
@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize("warmup", [0.0, 0.02, 0.3])
@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_the_live_fraction_is_the_schedule(
    engine: Engine, kind: ScheduleKind, warmup: float, floor: float, steps: int
) -> None:
    schedule = Schedule(
        kind=kind, warmup_fraction=warmup, decay_fraction=0.2, min_lr_fraction=floor
    )
    for step, fraction in enumerate(fractions(engine, schedule, steps)):
        # Both sides round a handful of times at 1e-16; near a floor of 0 the difference of two
        # numbers near 1 is left, hence the absolute part.
        assert fraction == pytest.approx(schedule.at(step, steps), rel=1e-12, abs=1e-15)


def test_the_comparison_tells_schedules_apart(engine: Engine) -> None:
    """Negative control: a warmup longer by one step in a hundred, or a floor of 1 %, is seen."""
    schedule = Schedule(kind="cosine", warmup_fraction=0.02, min_lr_fraction=0.1)
    for wrong in (
        Schedule(kind="cosine", warmup_fraction=0.03, min_lr_fraction=0.1),
        Schedule(kind="cosine", warmup_fraction=0.02, min_lr_fraction=0.11),
        Schedule(kind="linear", warmup_fraction=0.02, min_lr_fraction=0.1),
    ):
        worst = max(
            abs(fraction - wrong.at(step, 101))
            for step, fraction in enumerate(fractions(engine, schedule, 101))
        )
        assert worst > 1e-3
