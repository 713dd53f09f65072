"""`torchrun -m megatron_completedp.train --config run.yaml`: train a run, or take it up again."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_completedp.config.cli import load_run, run_command
from megatron_completedp.plan.run_plan import Plan

PROG = "torchrun -m megatron_completedp.train"
DESCRIPTION = """\
Train the run that a YAML file and flags describe. Started again, it resumes from its newest
checkpoint. One process trains without torchrun too: python -m megatron_completedp.train ...

Example:
  torchrun --nproc-per-node 2 -m megatron_completedp.train --config run.yaml \\
      --tensor-model-parallel-size 2
"""


@dataclass(frozen=True, kw_only=True)
class TrainFlags:
    """Flags of this command alone."""

    dry_run: bool = False
    """Print the resolved per-module table and stop: no model, no data, no GPU."""


def main(argv: Sequence[str]) -> int:
    """Train the run that `argv` describes. Returns the exit code."""
    config, flags = load_run(argv, prog=PROG, description=DESCRIPTION, extra=TrainFlags)
    plan = Plan.of(config)
    if flags.dry_run:
        print(plan)
        return 0
    _log_on_rank_zero()
    # Torch and Megatron take seconds to import; --help, --dry-run and bad values do not wait.
    from megatron_completedp.train.start import train

    train(plan)
    return 0


def _log_on_rank_zero() -> None:
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format="%(asctime)s %(message)s" if rank == 0 else f"%(asctime)s rank {rank}: %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    # Megatron's own lines and its import-time warnings about absent packages say nothing about this
    # run; which layers were chosen, and why, is in our log.
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")


if __name__ == "__main__":
    sys.exit(run_command(main))
