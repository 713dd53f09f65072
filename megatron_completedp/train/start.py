"""Start a run: resolve its numbers, check its data, claim its folder, build its engine."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection
from pathlib import Path

import torch.distributed as dist

from megatron_completedp.config.run import check_world
from megatron_completedp.mcore.dataset import build_datasets
from megatron_completedp.mcore.engine import Engine
from megatron_completedp.mcore.groups import describe_groups
from megatron_completedp.mcore.parallel import initialize_parallel
from megatron_completedp.mcore.platform import detect_platform
from megatron_completedp.plan.run_plan import Plan
from megatron_completedp.train import folder as run_folder
from megatron_completedp.train.data_check import check_data
from megatron_completedp.train.loop import Run, RunResult
from megatron_completedp.train.signals import StopSignals
from megatron_completedp.train.watchdog import GRACE_S, Watchdog

logger = logging.getLogger(__name__)


def train(
    plan: Plan,
    *,
    allowed_changes: Collection[str] = (),
    stop: Callable[[], bool] = lambda: False,
) -> RunResult:
    """Train `plan` to its last step, from its newest checkpoint if it has one.

    All ranks call this, in their main thread. A stop signal to any rank, or its `stop`, which every
    step asks, makes all of them save and return after the present step. `allowed_changes` names
    hyperparameters, as module.field, that may differ from the checkpoint's. Raises CompletedPError
    subclasses for what a user can mend; whatever happens, the folder keeps every finished metrics
    row and complete checkpoint.
    """
    timeout_s, folder = plan.config.training.timeout_s, Path(plan.config.run_dir)
    rank = int(os.environ.get("RANK", "0"))
    with StopSignals() as signals, Watchdog(timeout_s, folder=folder, rank=rank) as watchdog:
        run = _start(plan, watchdog, allowed_changes)
        run.engine.stop_requested = lambda: signals.requested() or stop()
        return run.to_the_end()


def _start(plan: Plan, watchdog: Watchdog, allowed_changes: Collection[str]) -> Run:
    """Everything before the first step."""
    config = plan.config
    # Before anything can fail: a launcher must not take an old request for this start's.
    run_folder.withdraw_requeue(Path(config.run_dir))
    platform = detect_platform(config.training.device)
    state = initialize_parallel(
        platform,
        config.parallel,
        # The watchdogs end a hang first, with stacks; the collectives' own timeout has none.
        timeout_s=config.training.timeout_s + 2 * GRACE_S,
        seed=config.seed,
    )
    # Every rank checks for itself, so that all of them stop on bad input and none waits.
    check_world(config, state.world_size)
    tokenizer = check_data(config, rank=state.rank, world_size=state.world_size)
    folder = run_folder.claim(config, may_change_hyperparams=bool(allowed_changes))
    dist.barrier()
    is_new = not (folder / run_folder.CONFIG_FILE).exists()
    if state.rank == 0 and is_new:
        run_folder.write_plan(folder, config, plan.resolved, plan.budget)
    dist.barrier()
    logger.info("%s; %d ranks", platform.describe(), state.world_size)
    if config.recipe:
        logger.info("%s", config.recipe)
    datasets = build_datasets(
        config.data,
        tokenizer=tokenizer,
        seq_length=config.model.seq_length,
        seed=config.seed,
        train_samples=config.steps * config.training.global_batch_size,
        valid_samples=config.evaluation.samples,
        cache_dir=config.data.cache_dir or str(folder / "cache"),
    )
    engine = Engine(config, plan.resolved, platform)
    logger.info("hyperparameters by group\n%s", describe_groups(engine.groups, engine.inventory))
    run = Run(
        config,
        folder,
        engine,
        platform,
        state,
        datasets,
        watchdog,
        allowed_changes=allowed_changes,
    )
    # Not earlier: hyperparameters that the checkpoint refuses must not replace the run's own.
    if state.rank == 0 and not is_new:
        run_folder.write_plan(folder, config, plan.resolved, plan.budget)
    return run
