"""`torchrun -m megatron_completedp.train --config run.yaml`: train a run, or take it up again."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from megatron_completedp.config.cli import load_run, run_command
from megatron_completedp.core.identity import check_names
from megatron_completedp.errors import REQUEUE_EXIT_CODE, CompletedPError, ConfigError
from megatron_completedp.plan.run_plan import Plan

PROG = "torchrun -m megatron_completedp.train"
DESCRIPTION = """\
Train the run that a YAML file and flags describe. Started again, it resumes from its newest
checkpoint. One process trains without torchrun too: python -m megatron_completedp.train ...

SIGTERM, SIGUSR1 or Ctrl-C to any rank: finish the step, save, leave the file `requeue` in run_dir
(until the next start) and exit with code 75; torchrun itself exits with 1. A second signal exits at
once. torchrun forwards SIGTERM and Ctrl-C, and kills after --shutdown-timeout (30 s unless set);
SIGUSR1 ends torchrun itself unless it is in --signals-to-handle.

Examples:
  torchrun --nproc-per-node 2 -m megatron_completedp.train --config run.yaml \\
      --tensor-model-parallel-size 2
  python -m megatron_completedp.train --config run.yaml --recipe recipe.yaml
  python -m megatron_completedp.train --config run.yaml --dry-run --world-size 2048
"""

#: How much sooner rank 0 reports an error than the others: the skew of their start, with room.
HEAD_START_S = 10.0


@dataclass(frozen=True, kw_only=True)
class TrainFlags:
    """Flags of this command alone."""

    dry_run: bool = False
    """Print the resolved per-module table and stop: no model, no data, no GPU."""
    world_size: int | None = None
    """With --dry-run: build ranks of a run on so many GPUs too, without data or GPUs, and hold what
    each of them owns, trains with, saves and takes in memory against the model and the plan."""
    all_ranks: bool = False
    """With --world-size: build every rank; without it the first data-parallel replica and the
    corners of the last."""
    allow_hp_change: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A hyperparameter that may differ from the checkpoint's, such as q.lr, or *.lr for every
    module; can be repeated. Without it a run with other hyperparameters is not resumed."""


def main(argv: Sequence[str]) -> int:
    """Train the run that `argv` describes. Returns the exit code."""
    try:
        return _run(argv)
    except CompletedPError:
        # Most errors are the same on every rank. torchrun ends the others once rank 0 has left, so
        # such an error is printed once; one that rank 0 does not share still comes out.
        if _rank() != 0:
            time.sleep(HEAD_START_S)
        raise


def _run(argv: Sequence[str]) -> int:
    config, flags = load_run(argv, prog=PROG, description=DESCRIPTION, extra=TrainFlags)
    allowed_changes = check_names(flags.allow_hp_change)
    plan = Plan.of(config)
    if flags.dry_run:
        return _dry_run(plan, flags)
    if flags.world_size is not None or flags.all_ranks:
        raise ConfigError(
            "--world-size and --all-ranks describe a dry run; add --dry-run. A run has the ranks "
            "that torchrun starts."
        )
    _log_on_rank_zero()
    # Torch and Megatron take seconds to import; --help, the tables and bad values do not wait.
    from megatron_completedp.mcore.parallel import destroy_parallel
    from megatron_completedp.train.start import train

    result = train(plan, allowed_changes=allowed_changes)
    # Not after an error: it would wait for ranks that may have gone.
    destroy_parallel()
    return REQUEUE_EXIT_CODE if result.stopped else 0


def _dry_run(plan: Plan, flags: TrainFlags) -> int:
    print(plan)
    if flags.world_size is None:
        if flags.all_ranks:
            raise ConfigError("--all-ranks is of the --world-size to simulate; give it too.")
        return 0
    from megatron_completedp.mcore.dry_run import dry_run

    # Megatron's own lines, repeated for every rank, say nothing about this run.
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    print(f"\n{dry_run(plan, world_size=flags.world_size, all_ranks=flags.all_ranks)}")
    return 0


def _log_on_rank_zero() -> None:
    rank = _rank()
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format="%(asctime)s %(message)s" if rank == 0 else f"%(asctime)s rank {rank}: %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    # Megatron's own lines say nothing about this run; which layers it has, and why, is in ours.
    logging.getLogger("megatron.core").setLevel(logging.ERROR)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


if __name__ == "__main__":
    sys.exit(run_command(main))
