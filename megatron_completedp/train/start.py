"""Start a run: resolve its numbers, check its data, claim its folder, build its engine."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from pathlib import Path

import torch.distributed as dist

from megatron_completedp.config.run import RunConfig, check_world
from megatron_completedp.data.indexed import check_pair
from megatron_completedp.data.tokenizer import Tokenizer, load_tokenizer
from megatron_completedp.errors import ConfigError, DataError
from megatron_completedp.mcore.dataset import build_datasets
from megatron_completedp.mcore.engine import Engine
from megatron_completedp.mcore.groups import describe_groups
from megatron_completedp.mcore.parallel import initialize_parallel
from megatron_completedp.mcore.platform import detect_platform
from megatron_completedp.plan.run_plan import Plan
from megatron_completedp.train import folder as run_folder
from megatron_completedp.train.loop import Run, RunResult
from megatron_completedp.train.signals import StopSignals
from megatron_completedp.train.watchdog import GRACE_S, Watchdog

logger = logging.getLogger(__name__)


def train(plan: Plan, *, allowed_changes: Collection[str] = ()) -> RunResult:
    """Train `plan` to its last step, from its newest checkpoint if it has one.

    All ranks call this, in their main thread. A stop signal to any rank makes all of them save and
    return after the present step. `allowed_changes` names hyperparameters, as module.field, that
    may differ from the checkpoint's. Raises CompletedPError subclasses for what a user can mend;
    whatever happens, the folder keeps every finished metrics row and complete checkpoint.
    """
    timeout_s, folder = plan.config.training.timeout_s, Path(plan.config.run_dir)
    rank = int(os.environ.get("RANK", "0"))
    with StopSignals() as signals, Watchdog(timeout_s, folder=folder, rank=rank) as watchdog:
        return _start(plan, watchdog, signals, allowed_changes).to_the_end()


def _start(
    plan: Plan, watchdog: Watchdog, signals: StopSignals, allowed_changes: Collection[str]
) -> Run:
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
    tokenizer = check_data(config)
    folder = run_folder.claim(config, may_change_hyperparams=bool(allowed_changes))
    dist.barrier()
    is_new = not (folder / run_folder.CONFIG_FILE).exists()
    if state.rank == 0 and is_new:
        run_folder.write_plan(folder, config, plan.resolved, plan.budget)
    dist.barrier()
    logger.info("%s; %d ranks", platform.describe(), state.world_size)
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
    engine.stop_requested = signals.requested
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


def check_data(config: RunConfig) -> Tokenizer:
    """Verify every .bin/.idx pair and that no token id can exceed the embedding.

    Raises ConfigError or DataError before any model is built; returns the tokenizer.
    """
    data, model = config.data, config.model
    if not data.train:
        raise ConfigError("data.train is empty; name at least one prefix of a .bin/.idx pair.")
    if config.evaluation.interval and not data.valid:
        raise ConfigError(
            "data.valid is empty but evaluation.interval is "
            f"{config.evaluation.interval}; name a validation prefix, or set the interval to 0."
        )
    if data.tokenizer is None:
        raise ConfigError(
            "data.tokenizer is missing; name the tokenizer the data was made with, so that its "
            "ids can be checked against model.vocab_size."
        )
    tokenizer = load_tokenizer(Path(data.tokenizer))
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f"data.tokenizer {data.tokenizer} has {tokenizer.vocab_size} ids but model.vocab_size "
            f"is {model.vocab_size}; ids beyond it would have no embedding. Set model.vocab_size "
            f"to {tokenizer.vocab_size}."
        )
    tokens = sum(check_pair(Path(prefix)).tokens for prefix in data.train)
    logger.info(
        "%s training tokens on disk; the run reads %.2f times that",
        f"{tokens:,}",
        config.steps * config.batch_tokens / tokens,
    )
    if config.evaluation.interval:
        needed = config.evaluation.samples * model.seq_length + 1
        held_out = sum(check_pair(Path(prefix)).tokens for prefix in data.valid)
        if held_out < needed:
            raise DataError(
                f"the validation data has {held_out:,} tokens; evaluation.samples = "
                f"{config.evaluation.samples} sequences of {model.seq_length} need {needed:,}. "
                "Use fewer samples or more text."
            )
    return tokenizer
