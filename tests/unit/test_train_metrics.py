"""metrics.jsonl over crashes and restarts, and the optional sinks."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest

from megatron_completedp.data.jsonl import read_whole_rows
from megatron_completedp.errors import ConfigError
from megatron_completedp.train.metrics import (
    ConsoleSink,
    MetricsFile,
    Row,
    TensorBoardSink,
)

ROWS: list[Row] = [
    {"kind": "train", "step": 1, "loss": 3.0},
    {"kind": "train", "step": 2, "loss": 2.5},
    {"kind": "eval", "step": 2, "loss": 2.6},
    {"kind": "train", "step": 3, "loss": 2.25},
    {"kind": "eval", "step": 4, "loss": 2.2},
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


def test_resuming_drops_only_what_will_be_written_again(path: Path) -> None:
    """Rows at the resumed step itself were written before its checkpoint: they stay."""
    MetricsFile(path, step=2).close()
    assert read_whole_rows(path) == ROWS[:3]


def test_a_run_that_starts_over_drops_everything(path: Path) -> None:
    MetricsFile(path, step=0).close()
    assert read_whole_rows(path) == []


def test_a_torn_line_is_dropped_and_the_next_row_is_whole(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])
    assert read_whole_rows(path) == ROWS[:-1]
    metrics = MetricsFile(path, step=4)
    metrics.write(ROWS[-1])
    metrics.close()
    assert read_whole_rows(path) == ROWS


def test_rows_are_there_before_the_file_is_closed(tmp_path: Path) -> None:
    """A run that is killed keeps every row it has written."""
    metrics = MetricsFile(tmp_path / "metrics.jsonl", step=0)
    metrics.write(ROWS[0])
    assert read_whole_rows(tmp_path / "metrics.jsonl") == ROWS[:1]
    metrics.close()


def test_a_missing_file_has_no_rows(tmp_path: Path) -> None:
    assert read_whole_rows(tmp_path / "metrics.jsonl") == []


def test_console_has_one_line_per_row(caplog: pytest.LogCaptureFixture) -> None:
    console = ConsoleSink(steps=100)
    train = {"grad_norm": 0.5, "lr_fraction": 0.25, "tokens_per_s": 1234.5}
    with caplog.at_level(logging.INFO):
        console.write({**ROWS[0], **train})
        console.write(ROWS[2])
        console.write({"kind": "event", "step": 3, "message": "the loss is nan"})
    assert caplog.messages == [
        "step   1/100  loss 3.0000  grad norm 0.500  lr x0.250  1,234 tokens/s",
        "step   2/100  validation loss 2.6000 nats/token",
        "step   3/100  the loss is nan",
    ]


def test_missing_tensorboard_is_a_config_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # None in sys.modules is how Python itself marks a module as not importable.
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"logging.tensorboard is on.*pip install tensorboard"):
        TensorBoardSink(tmp_path)
