"""The journal of a run: its metrics and events, and the time that its steps take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_completedp.config.run import RunConfig
from megatron_completedp.errors import TrainingDiverged
from megatron_completedp.mcore.engine import StepResult
from megatron_completedp.mcore.platform import Platform
from megatron_completedp.train.divergence import Action
from megatron_completedp.train.folder import METRICS_FILE
from megatron_completedp.train.metrics import ConsoleSink, MetricsFile, Row, Sink, TensorBoardSink


class Stopwatch:
    """Mean time of a step since the last reset, evaluations and saves left out."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start from zero."""
        self._start = time.perf_counter()
        self.laps = 0
        """Steps since then, whether their updates were applied or not."""

    def seconds_per_lap(self) -> float:
        """The mean time of a step, in seconds; the time since the reset while there is none."""
        return (time.perf_counter() - self._start) / max(self.laps, 1)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time that the block takes out."""
        before = time.perf_counter()
        yield
        self._start += time.perf_counter() - before


class Journal:
    """What one run writes down. Every rank has one and times its steps, but rank 0 alone writes."""

    def __init__(
        self, config: RunConfig, folder: Path, platform: Platform, *, step: int, is_main: bool
    ) -> None:
        """Open the sinks of a run in `folder` that goes on after `step` finished steps.

        `is_main` marks rank 0. Raises ConfigError for TensorBoard where it is not installed.
        """
        self._batch_tokens = config.batch_tokens
        self._platform = platform
        self.stopwatch = Stopwatch()
        """The loop counts its steps here and pauses it for all that is no step."""
        self._sinks = _open_sinks(config, folder, step) if is_main else []

    def close(self) -> None:
        """Flush and close the sinks; no row comes after."""
        for sink in self._sinks:
            sink.close()

    def trained(self, step: int, result: StepResult) -> None:
        """The `train` row of `step`, with the mean time of a step since the row before."""
        self._platform.synchronize()
        seconds = self.stopwatch.seconds_per_lap()
        self.stopwatch.reset()
        self._write(
            {
                "kind": "train",
                "step": step,
                "tokens": step * self._batch_tokens,
                "loss": result.loss,
                "grad_norm": result.grad_norm,
                "lr_fraction": result.lr,
                "step_s": seconds,
                "tokens_per_s": self._batch_tokens / seconds,
                "peak_memory_bytes": self._platform.peak_memory_bytes(),
            }
        )

    def evaluated(self, step: int, loss: float) -> None:
        """The `eval` row of `step`: the validation loss in nats per token."""
        self._write({"kind": "eval", "step": step, "loss": loss})

    def resumed(self, step: int, note: str) -> None:
        """The event of a start from a checkpoint about which there is `note` to say."""
        self._write({"kind": "event", "step": step, "what": "resume", "message": note})

    def diverged(self, step: int, error: TrainingDiverged, *, policy: Action, message: str) -> None:
        """The event of a step or an evaluation that went wrong, and what `policy` made of it."""
        self._write(
            {
                "kind": "event",
                "step": step,
                "what": error.cause,
                "policy": policy,
                "groups": list(error.groups),
                "message": message,
            }
        )

    def stopped(self, step: int, message: str) -> None:
        """The event of a run that a signal stopped, to be started again."""
        self._write(
            {"kind": "event", "step": step, "what": "stop", "policy": "requeue", "message": message}
        )

    def _write(self, row: Row) -> None:
        for sink in self._sinks:
            sink.write(row)


def _open_sinks(config: RunConfig, folder: Path, step: int) -> list[Sink]:
    sinks: list[Sink] = [MetricsFile(folder / METRICS_FILE, step=step), ConsoleSink(config.steps)]
    if config.logging.tensorboard:
        sinks.append(TensorBoardSink(folder))
    return sinks
