"""results.jsonl over crashes, other configs and several writers at once."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from megatron_completedp.errors import ConfigError, DataError
from megatron_completedp.study.results import Results

IDENTITY: dict[str, Any] = {"base": {"hidden_size": 64}, "steps": (1, 2), "alpha": 1.0}
ROWS = [{"id": "a", "loss": 4.0}, {"id": "b", "loss": 3.5}]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "check" / "results.jsonl"
    results = Results(path, IDENTITY)
    for row in ROWS:
        results.append(row)
    return path


def test_rows_come_back_when_the_file_is_opened_again(path: Path) -> None:
    assert Results(path, IDENTITY).rows() == ROWS
    assert len(path.read_text().splitlines()) == 1 + len(ROWS), "one header"


def test_the_header_says_what_the_rows_are_of(path: Path) -> None:
    header = json.loads(path.read_text().splitlines()[0])
    assert header["identity"]["base"] == {"hidden_size": 64}
    assert len(header["hash"]) == 64, "sha256 in hex"


def test_rows_of_another_text_are_refused_and_read_without_any(tmp_path: Path) -> None:
    """Paths say where a text lies. What one side does not know is not held against the other."""
    path = tmp_path / "results.jsonl"
    Results(path, IDENTITY, text={"data/train": "a" * 64}).append(ROWS[0])
    assert Results(path, IDENTITY, text={"data/train": "a" * 64}).rows() == ROWS[:1]
    assert Results(path, IDENTITY).rows() == ROWS[:1], "the text is not here"
    Results(path, IDENTITY, text={"data/valid": "b" * 64})
    with pytest.raises(ConfigError, match=r"text data/train was aaaa.*, is now bbbb"):
        Results(path, IDENTITY, text={"data/train": "b" * 64})
    old = tmp_path / "old.jsonl"
    Results(old, IDENTITY).append(ROWS[0])
    assert Results(old, IDENTITY, text={"data/train": "a" * 64}).rows() == ROWS[:1]


@pytest.mark.parametrize("cut", [1, 5])
def test_a_torn_last_line_is_no_row_and_leaves_the_next_one_whole(path: Path, cut: int) -> None:
    """A cut of 1 leaves valid JSON without its newline: it cannot be told from half a number."""
    path.write_bytes(path.read_bytes()[:-cut])
    results = Results(path, IDENTITY)
    assert results.rows() == ROWS[:1]
    results.append({"id": "c"})
    assert results.rows() == [ROWS[0], {"id": "c"}]


def test_a_line_torn_while_the_file_is_open(path: Path) -> None:
    """Another process may crash between two appends of this one."""
    results = Results(path, IDENTITY)
    with path.open("ab") as stream:
        stream.write(b'{"id": "torn", "lo')
    assert results.rows() == ROWS
    results.append({"id": "c"})
    assert results.rows() == [*ROWS, {"id": "c"}]


def test_a_torn_header_is_written_again(path: Path) -> None:
    path.write_bytes(b'{"hash": "12')
    assert Results(path, IDENTITY).rows() == []


@pytest.mark.parametrize(
    ("identity", "named"),
    [
        ({**IDENTITY, "base": {"hidden_size": 128}}, ["base.hidden_size was 64, is now 128"]),
        ({**IDENTITY, "steps": (1, 3)}, ["steps was [1, 2], is now [1, 3]"]),
        ({**IDENTITY, "data": "text"}, ["data was (not given), is now text"]),
        ({"base": {}}, ["alpha was 1.0", "base.hidden_size was 64", "steps was [1, 2]"]),
    ],
)
def test_results_of_another_config_are_refused(
    path: Path, identity: dict[str, Any], named: list[str]
) -> None:
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="results of another config") as error:
        Results(path, identity)
    assert all(text in str(error.value) for text in [*named, str(path), "--out"])
    assert path.read_bytes() == before


def test_a_file_without_a_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"id": "a"}\n')
    with pytest.raises(DataError, match="no header"):
        Results(path, IDENTITY)


@pytest.mark.parametrize("line", ["{torn", "[1, 2]", ""])
def test_a_broken_line_in_the_middle_is_an_error(path: Path, line: str) -> None:
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, *lines[1:]]) + "\n")
    with pytest.raises(DataError, match="line 2"):
        Results(path, IDENTITY).rows()


def test_a_diverged_loss_survives(path: Path) -> None:
    results = Results(path, IDENTITY)
    results.append({"id": "c", "loss": float("nan"), "diverged": True})
    loss = results.rows()[-1]["loss"]
    assert loss != loss, "NaN comes back as NaN"


def test_an_append_waits_for_whoever_is_in_the_file(path: Path) -> None:
    results = Results(path, IDENTITY)
    writer = threading.Thread(target=results.append, args=({"id": "c"},))
    with path.open("rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_SH)
        writer.start()
        # Far longer than an append takes. Too short a wait could only let a missing lock pass.
        writer.join(timeout=0.5)
        assert writer.is_alive()
        assert results.rows() == ROWS
    writer.join(timeout=60)
    assert results.rows() == [*ROWS, {"id": "c"}]


WRITER = """
import sys
from pathlib import Path
from megatron_completedp.study.results import Results

path, name = Path(sys.argv[1]), sys.argv[2]
for number in range(20):
    # Opened anew each time, so that headers race too. Rows beyond a pipe's or a page's size.
    Results(path, {"base": 1}).append({"writer": name, "number": number, "text": name * 9000})
"""


def test_processes_that_append_at_once_lose_and_tear_nothing(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    names = ["a", "b", "c"]
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), name]) for name in names]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0, 0]
    rows = Results(path, {"base": 1}).rows()
    for name in names:
        mine = [row for row in rows if row["writer"] == name]
        assert [row["number"] for row in mine] == list(range(20))
        assert {row["text"] for row in mine} == {name * 9000}
    assert len(rows) == 60
