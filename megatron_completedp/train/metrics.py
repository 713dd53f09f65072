"""Metrics of a run: one JSON object per line, always; the terminal and TensorBoard beside it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Protocol

from megatron_completedp.data.atomic import atomic_write
from megatron_completedp.data.jsonl import read_whole_rows
from megatron_completedp.errors import ConfigError

logger = logging.getLogger(__name__)

Row = dict[str, Any]


class Sink(Protocol):
    """Something that takes rows. A row has `kind` (train, eval or event) and `step`."""

    def write(self, row: Row) -> None:
        """Take one row."""

    def close(self) -> None:
        """Flush what is pending; no row comes after."""


class MetricsFile:
    """metrics.jsonl. Opening it for a run at `step` drops the rows that the run will write again.

    A line torn by a crash is dropped with them; everything up to the checkpoint stays.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        kept = [row for row in read_whole_rows(path) if row["step"] <= step] if step else []
        with atomic_write(path) as stream:
            stream.write("".join(json.dumps(row) + "\n" for row in kept).encode())
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Row) -> None:
        """Append one line; it reaches the operating system at once."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class ConsoleSink:
    """One log line per row, for people."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def write(self, row: Row) -> None:
        """Log one row."""
        where = f"step {row['step']:>{len(str(self._steps))}}/{self._steps}"
        if row["kind"] == "train":
            logger.info(
                "%s  loss %.4f  grad norm %.3f  lr x%.3f  %s tokens/s",
                where,
                row["loss"],
                row["grad_norm"],
                row["lr_fraction"],
                f"{row['tokens_per_s']:,.0f}",
            )
        elif row["kind"] == "eval":
            logger.info("%s  validation loss %.4f nats/token", where, row["loss"])
        else:
            logger.info("%s  %s", where, row["message"])

    def close(self) -> None:
        """Nothing is pending."""


class TensorBoardSink:
    """TensorBoard event files in the run's folder."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "logging.tensorboard is on, but the package tensorboard is not installed: "
                "pip install tensorboard, or turn it off."
            ) from error
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, row: Row) -> None:
        """Write every number of a row under kind/name."""
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(f"{row['kind']}/{name}", value, row["step"])

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()
