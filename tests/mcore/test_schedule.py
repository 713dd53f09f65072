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


def rates_and_decays(
    engine: Engine, schedule: Schedule, steps: int
) -> list[list[tuple[float, float, float, float]]]:
    """(peak, rate, planned decay, decay) of every group, before each update of a run."""
    training = engine.config.training
    optimizer = build_optimizer(
        engine.chunks,
        engine.groups,
        precision=training.precision,
        clip_grad=training.clip_grad,
        parallel=engine.config.parallel,
        schedule=schedule,
    )
    scheduler = build_scheduler(optimizer, schedule, steps)
    seen = []
    for _ in range(steps):
        live = {int(group["lr_mult"]) - 1: group for group in optimizer.param_groups}
        assert len(live) == len(engine.groups)
        seen.append(
            [
                (
                    group.hyperparams.lr,
                    live[group.index]["lr"],
                    group.hyperparams.weight_decay,
                    live[group.index]["weight_decay"],
                )
                for group in engine.groups
            ]
        )
        scheduler.step(1)
    return seen


@pytest.mark.parametrize("steps", LENGTHS)
@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize("warmup", [0.0, 0.02, 0.3])
@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_every_group_follows_the_schedule_from_its_own_peak(
    engine: Engine, kind: ScheduleKind, warmup: float, floor: float, steps: int
) -> None:
    schedule = Schedule(
        kind=kind, warmup_fraction=warmup, decay_fraction=0.2, min_lr_fraction=floor
    )
    for step, groups in enumerate(rates_and_decays(engine, schedule, steps)):
        assert len({peak for peak, *_ in groups}) > 2, "with one peak nothing would be compared"
        for peak, rate, planned_decay, decay in groups:
            # Both sides round a handful of times at 1e-16; near a floor of 0 the difference of two
            # numbers of the peak's size is left, hence the absolute part.
            expected = peak * schedule.at(step, steps)
            assert rate == pytest.approx(expected, rel=1e-12, abs=1e-15 * peak)
            assert decay == planned_decay


def test_the_comparison_tells_schedules_apart(engine: Engine) -> None:
    """Negative control: a warmup longer by one step in a hundred, or a floor of 1 %, is seen."""
    schedule = Schedule(kind="cosine", warmup_fraction=0.02, min_lr_fraction=0.1)
    for wrong in (
        Schedule(kind="cosine", warmup_fraction=0.03, min_lr_fraction=0.1),
        Schedule(kind="cosine", warmup_fraction=0.02, min_lr_fraction=0.11),
        Schedule(kind="linear", warmup_fraction=0.02, min_lr_fraction=0.1),
    ):
        worst = max(
            abs(rate / peak - wrong.at(step, 101))
            for step, groups in enumerate(rates_and_decays(engine, schedule, 101))
            for peak, rate, *_ in groups
        )
        assert worst > 1e-3
