"""Files of evaluation rows: which kind they are, what guessing scores, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import zstandard

from megatron_completedp.convert.evaluate import Score, main, read_task, table
from megatron_completedp.errors import ConfigError, DataError

CHOICE = {"query": "Sky?", "choices": ["blue", "green", "red", "black"], "gold": 0}
PAIR = {"sentence_good": "He is.", "sentence_bad": "He are.", "UID": "agreement"}


def write(path: Path, rows: list[Any]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(zstandard.compress(text) if path.suffix == ".zst" else text)
    return path


@pytest.mark.parametrize(
    ("row", "chance"),
    [
        (CHOICE, 0.25),
        ({**CHOICE, "choices": ["yes", "no"]}, 0.5),
        (PAIR, 0.5),
        ({"context_options": ["a", "b"], "continuation": "c", "gold": 1}, 0.5),
        ({"context": "Once upon a", "continuation": "time"}, 0.0),
        ({"text": "Plain text.", "meta": {}}, None),
    ],
)
def test_keys_say_what_a_file_is(tmp_path: Path, row: dict[str, Any], chance: float | None) -> None:
    task = read_task(write(tmp_path / "task.jsonl", [row]))
    assert (task.name, task.of, task.chance) == ("task", 1, chance)


def test_chance_is_the_mean_over_rows_with_other_numbers_of_choices(tmp_path: Path) -> None:
    rows = [CHOICE, {**CHOICE, "choices": ["yes", "no"]}]
    assert read_task(write(tmp_path / "arc.jsonl", rows)).chance == 0.375


def test_a_limit_spreads_over_the_file(tmp_path: Path) -> None:
    """BLiMP is sorted by phenomenon: its first rows are one phenomenon."""
    file = write(tmp_path / "blimp.jsonl.zst", [{**PAIR, "UID": i // 25} for i in range(100)])
    task = read_task(file, limit=8)
    assert [row["UID"] for row in task.rows] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert (task.name, task.of) == ("blimp", 100)
    assert len(read_task(file, limit=1000).rows) == 100


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([CHOICE, {"question": "?"}], "row 2 has the keys question"),
        ([["a"]], "no JSON object"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_task(write(tmp_path / "x.jsonl", rows))


def test_a_missing_file_is_an_error_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.jsonl"):
        read_task(tmp_path / "nothing.jsonl")


def test_command_refuses_a_limit_of_nothing_and_a_folder_without_a_model(tmp_path: Path) -> None:
    file = write(tmp_path / "piqa.jsonl", [CHOICE])
    flags = ["--model", str(tmp_path), "--tasks", str(file)]
    with pytest.raises(ConfigError, match="--limit is 0"):
        main([*flags, "--limit", "0"])
    with pytest.raises(ConfigError, match=r"no config\.json"):
        main(flags)
    with pytest.raises(ConfigError, match="called piqa"):
        main([*flags, "--tasks", str(file)])


def test_table_has_chance_and_distance() -> None:
    score = Score(
        task="blimp",
        metric="acc",
        value=0.56,
        standard_error=0.02,
        chance=0.5,
        rows=600,
        of=67_000,
        too_long=2,
        sha256="",
    )
    assert score.above_chance == pytest.approx(3.0)
    line = table([score]).splitlines()[1].split()
    assert line == [
        "blimp",
        "600",
        "of",
        "67,000",
        "2",
        "acc",
        "0.5600",
        "0.0200",
        "0.5000",
        "+3.0",
    ]
