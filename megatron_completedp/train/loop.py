"""The steps of a run: resume, update, evaluate, save, report."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import Dataset
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from megatron_completedp.config.load import config_hash
from megatron_completedp.config.run import RunConfig
from megatron_completedp.errors import TrainingDiverged
from megatron_completedp.mcore.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from megatron_completedp.mcore.engine import Engine, StepResult
from megatron_completedp.mcore.parallel import ParallelState
from megatron_completedp.mcore.platform import Platform
from megatron_completedp.train import folder as run_folder
from megatron_completedp.train.loader import Batch, Share, steps_of_batches
from megatron_completedp.train.metrics import ConsoleSink, MetricsFile, Row, Sink, TensorBoardSink

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    steps: int
    train_loss: float
    """Cross entropy of the last batch trained on, in nats per token; NaN if none was."""
    valid_loss: float | None
    """Cross entropy on the validation samples at the end; None without validation."""


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
    ) -> None:
        self.config = config
        self.engine = engine
        self.platform = platform
        self.is_main = state.rank == 0
        self.checkpoints = folder / run_folder.CHECKPOINTS
        self.last_checkpoint = self._resume()
        self.share = Share(
            global_batch_size=config.training.global_batch_size,
            micro_batch_size=config.training.micro_batch_size,
            dp_rank=state.dp_rank,
            dp_size=state.dp_size,
        )
        self.train_set, self.valid_set = datasets
        self.stopwatch = _Stopwatch()
        self.sinks = self._open_sinks(folder) if self.is_main else []

    def to_the_end(self) -> RunResult:
        """Train the remaining steps. Raises TrainingDiverged, naming the last good checkpoint."""
        try:
            with logging_redirect_tqdm():
                return self._train()
        except TrainingDiverged as error:
            kept = self.last_checkpoint
            message = f"{error} " + (
                f"The last good checkpoint is {kept}." if kept else "No checkpoint was written yet."
            )
            self._write({"kind": "event", "step": self.engine.step, "message": message})
            raise TrainingDiverged(message) from error
        finally:
            for sink in self.sinks:
                sink.close()

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
        self.stopwatch.reset()
        with tqdm(total=steps, initial=engine.step, unit="step", disable=not show_bar) as bar:
            for batches in loader:
                result = engine.train_step(batches)
                loss = result.loss
                self.stopwatch.laps += 1
                bar.update()
                if engine.step % interval == 0 or engine.step == steps:
                    self._report(result)
                if _is_due(config.evaluation.interval, engine.step, steps):
                    valid_loss = self._evaluate()
                # After the evaluation: a model that cannot be evaluated is no good checkpoint.
                if self._save_is_due():
                    with self.stopwatch.paused():
                        self.last_checkpoint = self._save()
        return RunResult(steps=steps, train_loss=loss, valid_loss=valid_loss)

    def _resume(self) -> Path | None:
        """Load the newest checkpoint; None for a fresh start."""
        found = list_checkpoints(self.checkpoints)
        if not found:
            return None
        load_checkpoint(self.engine, found[-1])
        logger.info("resumed from %s at step %d", found[-1], self.engine.step)
        return found[-1]

    def _save_is_due(self) -> bool:
        checkpoint, step = self.config.checkpoint, self.engine.step
        if step == self.config.steps:
            return checkpoint.save_at_end
        return checkpoint.interval > 0 and step % checkpoint.interval == 0

    def _save(self) -> Path:
        path = save_checkpoint(
            self.engine,
            self.checkpoints,
            config_hash=config_hash(self.config),
            keep_last=self.config.checkpoint.keep_last,
        )
        logger.info("saved %s", path)
        return path

    def _evaluate(self) -> float | None:
        """Measure and report the validation loss. Raises TrainingDiverged if it is not finite."""
        loss, step = self._validation_loss(), self.engine.step
        if loss is not None:
            self._write({"kind": "eval", "step": step, "loss": loss})
            if not math.isfinite(loss):
                raise TrainingDiverged(f"step {step}: the validation loss is {loss}.")
        return loss

    def _validation_loss(self) -> float | None:
        """Over the same `evaluation.samples` sequences every time; None where there are none."""
        if self.valid_set is None or not self.config.evaluation.interval:
            return None
        with self.stopwatch.paused():
            share = Share(
                global_batch_size=self.config.evaluation.samples,
                micro_batch_size=self.share.micro_batch_size,
                dp_rank=self.share.dp_rank,
                dp_size=self.share.dp_size,
            )
            (batches,) = steps_of_batches(self.valid_set, share, first_step=0, steps=1, workers=0)
            return self.engine.evaluate(batches)

    def _report(self, result: StepResult) -> None:
        self.platform.synchronize()
        seconds = self.stopwatch.seconds_per_lap()
        self.stopwatch.reset()
        tokens = self.config.batch_tokens
        self._write(
            {
                "kind": "train",
                "step": self.engine.step,
                "tokens": self.engine.step * tokens,
                "loss": result.loss,
                "grad_norm": result.grad_norm,
                "lr_fraction": result.lr,
                "step_s": seconds,
                "tokens_per_s": tokens / seconds,
                "peak_memory_bytes": self.platform.peak_memory_bytes(),
            }
        )

    def _open_sinks(self, folder: Path) -> list[Sink]:
        sinks: list[Sink] = [
            MetricsFile(folder / run_folder.METRICS_FILE, step=self.engine.step),
            ConsoleSink(self.config.steps),
        ]
        if self.config.logging.tensorboard:
            sinks.append(TensorBoardSink(folder))
        return sinks

    def _write(self, row: Row) -> None:
        for sink in self.sinks:
            sink.write(row)


class _Stopwatch:
    """Mean time of a step since the last reset, evaluations and saves left out."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._start = time.perf_counter()
        self.laps = 0

    def seconds_per_lap(self) -> float:
        return (time.perf_counter() - self._start) / max(self.laps, 1)

    @contextmanager
    def paused(self) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self._start += time.perf_counter() - before


def _is_due(interval: int, step: int, steps: int) -> bool:
    return interval > 0 and (step % interval == 0 or step == steps)
