"""The table and the bar of a preprocessing job."""

from __future__ import annotations

import io
import sys

import pytest

from megatron_completedp.core.render import text_table
from megatron_completedp.data.report import ProgressBar, expected_bytes


def test_columns_of_numbers_stand_to_the_right() -> None:
    rows = [("a", "1,234.5", "x"), ("long", "7", "3 y")]
    table = text_table(("name", "count", "note"), rows, left=None)
    assert table.splitlines() == ["name    count  note", "a     1,234.5  x", "long        7  3 y"]


def test_a_guess_at_what_a_file_expands_to() -> None:
    assert expected_bytes("a.jsonl", 100) == 100
    assert expected_bytes("a.jsonl.zst", 100) == 300


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_ends_where_the_shards_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guesses of 300 and 100 bytes; 500 were read of one, the other was found finished."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = ProgressBar({"a": 300, "b": 100})
    bar.advance("a", 2, 400, 1000)
    bar.advance("a", 1, 100, 500)
    bar.finish("a")
    bar.finish("b")
    bar.close()
    last = terminal.getvalue().rstrip().rpartition("\r")[2]
    assert last.startswith("100%")
    assert "500/500" in last
    for unit in ("documents/s", "tokens/s", "2 of 2 shards", "B/s"):
        assert unit in last


def test_a_log_file_gets_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar({"a": 300})
    bar.advance("a", 1, 300, 10)
    bar.finish("a")
    bar.close()
    assert capsys.readouterr().err == ""
