"""The steps of a run: resume, update, evaluate, save, report; skip, roll back, stop."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Collection, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch.utils.data import Dataset
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from megatron_completedp.config.load import config_hash
from megatron_completedp.config.run import RunConfig
from megatron_completedp.errors import TrainingDiverged
from megatron_completedp.mcore.checkpoint import Saver, resume
from megatron_completedp.mcore.engine import Engine, StepResult
from megatron_completedp.mcore.initial_weights import load_initial_weights
from megatron_completedp.mcore.parallel import ParallelState
from megatron_completedp.mcore.platform import Platform
from megatron_completedp.train import folder as run_folder
from megatron_completedp.train.divergence import Guard
from megatron_completedp.train.journal import Journal
from megatron_completedp.train.loader import Batch, Share, steps_of_batches
from megatron_completedp.train.watchdog import Watchdog

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    steps: int
    """Finished steps, fewer than the run's if it was stopped."""
    train_loss: float
    """Cross entropy of the last batch trained on, in nats per token; NaN if none was."""
    valid_loss: float | None
    """Cross entropy on the validation samples at the end; None without validation."""
    stopped: bool = False
    """A signal stopped the run after a checkpoint; started again, it goes on."""


class Run:
    """One run on this rank, from its newest checkpoint if it has one."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        engine: Engine,
        platform: Platform,
        state: ParallelState,
        datasets: tuple[Dataset[Batch], Dataset[Batch] | None],
        watchdog: Watchdog,
        *,
        allowed_changes: Collection[str] = (),
    ) -> None:
        self.config = config
        self.folder = folder
        self.engine = engine
        self.platform = platform
        self.is_main = state.rank == 0
        self.watchdog = watchdog
        self.checkpoints = folder / run_folder.CHECKPOINTS
        self.guard = Guard(config.divergence)
        self.allowed_changes = allowed_changes
        self.saver = Saver(
            engine, self.checkpoints, config.checkpoint, config_hash=config_hash(config)
        )
        resume_notes = self._resume()
        if engine.loop_state:
            self.guard.restore(engine.loop_state)
        self.rolled_back = False
        """Since the last save: the next one records what was left out, so it is due at once."""
        self.share = Share(
            global_batch_size=config.training.global_batch_size,
            micro_batch_size=config.training.micro_batch_size,
            dp_rank=state.dp_rank,
            dp_size=state.dp_size,
        )
        self.train_set, self.valid_set = datasets
        self.journal = Journal(config, folder, platform, step=engine.step, is_main=self.is_main)
        for note in resume_notes:
            self.journal.resumed(engine.step, note)

    def to_the_end(self) -> RunResult:
        """Train the remaining steps, or until the run is asked to stop.

        Raises TrainingDiverged, naming the last good checkpoint, when the policy says stop.
        """
        with closing(self.journal), logging_redirect_tqdm():
            return self._train()

    def _train(self) -> RunResult:
        config, engine = self.config, self.engine
        interval, steps = config.logging.interval, config.steps
        loader = steps_of_batches(
            self.train_set,
            self.share,
            first_step=engine.step,
            steps=steps,
            workers=2 if self.platform.name == "cuda" else 0,
        )
        show_bar = self.is_main and sys.stderr.isatty()
        loss, valid_loss = math.nan, None
        if engine.step == steps:
            logger.info("this run had finished its %d steps before; nothing is left to do", steps)
            valid_loss = self._validation_loss()
        self.watchdog.beat("the start-up")
        self.journal.stopwatch.reset()
        with tqdm(total=steps, initial=engine.step, unit="step", disable=not show_bar) as bar:
            for batches in loader:
                result = self._train_step(batches)
                self.journal.stopwatch.laps += 1
                bar.update()
                if result is not None:
                    loss = result.loss
                    if engine.step % interval == 0 or engine.step == steps:
                        self.journal.trained(engine.step, result)
                if _is_due(config.evaluation.interval, engine.step, steps):
                    valid_loss = self._evaluate()
                stopping = engine.stop_agreed and engine.step < steps
                # After the evaluation: a model that cannot be evaluated is no good checkpoint.
                if stopping or self.rolled_back or self._save_is_due(applied=result is not None):
                    self._checkpoint()
                self._note_saved(self.saver.poll(wait=stopping or engine.step == steps))
                if stopping:
                    self._announce_stop()
                    break
        return RunResult(
            steps=engine.step, train_loss=loss, valid_loss=valid_loss, stopped=engine.step < steps
        )

    def _train_step(self, batches: Sequence[Batch]) -> StepResult | None:
        """One step; None when the policy left its update out."""
        result: StepResult | None = None
        try:
            result = self.engine.train_step(batches, loss_limit=self.guard.loss_limit)
            self.guard.accept(result.loss)
        except TrainingDiverged as error:
            self._recover(error, step=self.engine.step + 1)
        self.watchdog.beat(f"step {self.engine.step}")
        return result

    def _recover(self, error: TrainingDiverged, *, step: int) -> None:
        """Do what the policy says about `error`; after a skip or rollback the run is at `step`.

        The step says which batch comes next and what the learning rate is, so both go on as if
        nothing had happened. Raises TrainingDiverged when the policy says stop.
        """
        self._note_saved(self.saver.poll(wait=True))
        action, reason = self.guard.decide(error, can_roll_back=self.last_checkpoint is not None)
        if action == "rollback":
            self._roll_back()
            reason += f" Weights and moments are those of {self.last_checkpoint}."
        elif action == "stop":
            kept = self.last_checkpoint
            reason += (
                f"The last good checkpoint is {kept}." if kept else "No checkpoint was written yet."
            )
        message = f"{error} {reason}"
        self.journal.diverged(step, error, policy=action, message=message)
        if action == "stop":
            raise TrainingDiverged(message, cause=error.cause, groups=error.groups) from error
        self.engine.move_to(step)

    def _roll_back(self) -> None:
        """Load the newest checkpoint, with its losses; what was left out stays counted."""
        events = self.guard.events
        with self.journal.stopwatch.paused():
            self._resume()
        self.guard.restore({**self.engine.loop_state, "events": events})
        self.rolled_back = True

    def _checkpoint(self) -> None:
        self.engine.loop_state = self.guard.state()
        with self.journal.stopwatch.paused():
            self._note_saved(self.saver.save())
        self.rolled_back = False
        self.watchdog.beat(f"the checkpoint of step {self.engine.step}")

    def _announce_stop(self) -> None:
        """After the checkpoint: write the event and the file that asks to be started again."""
        step = self.engine.step
        message = f"stopped on request at step {step}; start the run again to go on."
        self.journal.stopped(step, message)
        if self.is_main:
            run_folder.ask_for_requeue(self.folder, message)
        # torchrun ends the other ranks once one has left, and rank 0 must have written by then.
        dist.barrier()

    def _resume(self) -> tuple[str, ...]:
        """Load the newest whole checkpoint, if there is one; what there is to say about it."""
        found = resume(self.engine, self.checkpoints, allowed=self.allowed_changes)
        self.last_checkpoint = found.path
        start_from = self.config.training.start_from
        if found.path is None and start_from is not None:
            load_initial_weights(self.engine, Path(start_from))
            logger.info("weights from %s, a fresh optimizer", start_from)
        for note in found.notes:
            logger.warning("resume: %s", note)
        if found.path is not None:
            logger.info("resumed from %s at step %d", found.path, self.engine.step)
        return found.notes

    def _save_is_due(self, *, applied: bool) -> bool:
        """After a skip (not `applied`) none is: what made the step fail may be in the weights."""
        checkpoint, step = self.config.checkpoint, self.engine.step
        if step == self.config.steps:
            return checkpoint.save_at_end
        return applied and checkpoint.interval > 0 and step % checkpoint.interval == 0

    def _note_saved(self, path: Path | None) -> None:
        """Take note of a checkpoint that has become complete, if one has."""
        if path is not None:
            self.last_checkpoint = path
            logger.info("saved %s", path)

    def _evaluate(self) -> float | None:
        """Measure and report the validation loss; not finite, it follows the policy."""
        loss, step = self._validation_loss(), self.engine.step
        if loss is not None:
            self.journal.evaluated(step, loss)
            if not math.isfinite(loss):
                error = TrainingDiverged(
                    f"step {step}: the validation loss is {loss}.", cause="validation"
                )
                self._recover(error, step=step)
                loss = None  # it belongs to weights that are gone
        self.watchdog.beat(f"the evaluation at step {step}")
        return loss

    def _validation_loss(self) -> float | None:
        """Over the same `evaluation.samples` sequences every time; None where there are none."""
        if self.valid_set is None or not self.config.evaluation.interval:
            return None
        with self.journal.stopwatch.paused():
            share = Share(
                global_batch_size=self.config.evaluation.samples,
                micro_batch_size=self.share.micro_batch_size,
                dp_rank=self.share.dp_rank,
                dp_size=self.share.dp_size,
            )
            (batches,) = steps_of_batches(self.valid_set, share, first_step=0, steps=1, workers=0)
            return self.engine.evaluate(batches)


def _is_due(interval: int, step: int, steps: int) -> bool:
    return interval > 0 and (step % interval == 0 or step == steps)
