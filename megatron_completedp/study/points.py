"""One run of a study, trained in its own folder, and how it ended by that folder's metrics.

The folder is what counts, not the process: a run that finished, or diverged, just before its
process was killed is read and not trained again.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any, TextIO

from megatron_completedp.config.load import load_config
from megatron_completedp.config.run import RunConfig
from megatron_completedp.config.sections import CheckpointConfig, DivergenceConfig, LoggingConfig
from megatron_completedp.data.jsonl import read_whole_rows
from megatron_completedp.errors import CompletedPError, TrainingDiverged
from megatron_completedp.plan.run_plan import Plan
from megatron_completedp.train import folder as run_folder

#: Part of the run, at its end, over which the training loss is averaged.
LAST_PART = 0.1

#: Between looks at whether a run of several ranks is to stop.
_POLL_S = 0.25


def as_point(config: RunConfig) -> RunConfig:
    """`config` as a short run of a study: one evaluation, after the last step; a stop alone saves.

    A run that diverged is a result, so it stops there.
    """
    return replace(
        config,
        checkpoint=CheckpointConfig(interval=0, save_at_end=False),
        divergence=DivergenceConfig(),
        evaluation=replace(config.evaluation, interval=config.steps),
        # Ten rows in the last tenth of the run, over which the training loss is averaged.
        logging=LoggingConfig(interval=max(1, config.steps // 100)),
    )


def numbers_hash(plan: Plan) -> str:
    """Of what the run trains with, whatever the parametrization and the factors are called."""
    numbers = plan.resolved.as_json()
    modules = [
        {key: entry[key] for key in entry if key not in ("factors", "role")}
        for entry in numbers["modules"]
    ]
    kept = [modules, numbers["residual"], numbers["logit_multiplier"]]
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:8]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a finished run ended. A run that diverged has no losses."""

    diverged: bool
    """Not finite, or a validation loss above ln(vocab_size): worse than knowing nothing."""
    loss: float | None = None
    """Validation cross entropy after the last step, nats per token."""
    train_loss: float | None = None
    """Mean training cross entropy over the last tenth of the run."""


def outcome(config: RunConfig) -> Outcome | None:
    """How the run in `config.run_dir` ended; None when it has not."""
    rows = read_whole_rows(Path(config.run_dir) / run_folder.METRICS_FILE)
    if any(row["kind"] == "event" and row.get("policy") == "stop" for row in rows):
        return Outcome(diverged=True)
    losses = [row["loss"] for row in rows if (row["kind"], row["step"]) == ("eval", config.steps)]
    if not losses:
        return None
    if not losses[-1] <= math.log(config.model.vocab_size):
        return Outcome(diverged=True)
    start = (1 - LAST_PART) * config.steps
    last = [row["loss"] for row in rows if row["kind"] == "train" and row["step"] > start]
    return Outcome(diverged=False, loss=losses[-1], train_loss=sum(last) / len(last))


def train_point(
    config_file: Path, *, ranks: int, stop: Callable[[], bool]
) -> dict[str, Any] | None:
    """Train the run that `config_file` describes, to its end; the numbers of its row.

    Trained in this process for one rank, by torchrun for several. `stop` is asked throughout. None
    when it, or a signal, stopped the run: that has saved, and goes on from there the next time. A
    run whose process was killed instead starts again. Raises CompletedPError for a run that cannot
    be trained.
    """
    config = load_config(config_file)
    folder = Path(config.run_dir)
    start = time.perf_counter()
    found = outcome(config)
    if found is None:
        if not (folder / run_folder.CHECKPOINTS).exists():
            shutil.rmtree(folder, ignore_errors=True)
        if ranks == 1:
            _train_here(config, stop)
        else:
            _train_by_torchrun(config_file, config, ranks, stop)
        found = outcome(config)
    if found is None:
        return None
    tidy(folder)
    return {**vars(found), "steps": config.steps, "seconds": round(time.perf_counter() - start, 1)}


def tidy(folder: Path) -> None:
    """Remove from a run's folder what only its continuation needs: most of its size."""
    for name in ("cache", run_folder.CHECKPOINTS):
        shutil.rmtree(folder / name, ignore_errors=True)


def _train_here(config: RunConfig, stop: Callable[[], bool]) -> None:
    # Torch must not be imported before the worker has set its threads and its device.
    from megatron_completedp.mcore.parallel import destroy_parallel
    from megatron_completedp.train.start import train

    try:
        train(Plan.of(config), stop=stop)
    except TrainingDiverged:
        pass  # the event in the run's metrics says so
    finally:
        destroy_parallel()


def _train_by_torchrun(
    config_file: Path, config: RunConfig, ranks: int, stop: Callable[[], bool]
) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", "-m", "megatron_completedp.train"]
    process = subprocess.Popen(
        [*command, "--config", str(config_file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    # SLURM signals torchrun as well. A second signal ends it at once, but not its ranks, which
    # save: they have left when nobody holds their output any more.
    ranks_live = Thread(target=_pass_on_output, args=(process.stdout,), daemon=True)
    ranks_live.start()
    asked = False
    while ranks_live.is_alive():
        if stop() and not asked:
            asked = True
            process.terminate()  # torchrun hands SIGTERM on; SIGUSR1 would end torchrun itself
        ranks_live.join(_POLL_S)
    code = process.wait()
    # Ranks that are still importing when they are asked to stop just die.
    stopped = asked or (Path(config.run_dir) / run_folder.REQUEUE_FILE).exists()
    if code and not stopped and outcome(config) is None:
        raise CompletedPError(
            f"the run in {config.run_dir} on {ranks} ranks ended with exit code {code}; the "
            "worker's log has its output."
        )


def _pass_on_output(stream: TextIO) -> None:
    with stream:
        for line in stream:
            print(line, end="", flush=True)
