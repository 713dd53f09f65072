"""Files of evaluation rows: which kind they are, what guessing scores, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import zstandard

from megatron_completedp.convert.evaluate import Score, main, table
from megatron_completedp.convert.evaluate_tasks import read_task
from megatron_completedp.errors import ConfigError, DataError

CHOICE = {"query": "Sky?", "choices": ["blue", "green", "red", "black"], "gold": 0}
CONTEXTS = {"context_options": ["a", "b"], "continuation": "c", "gold": 1}
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
        (CONTEXTS, 0.5),
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
        # Each of these was scored, or ended in a traceback.
        ([CHOICE, {**CHOICE, "gold": 4}], r"row 2 has gold 4; .* right one of 4, 0 to 3"),
        ([{**CHOICE, "gold": -1}], "row 1 has gold -1"),
        ([{**CHOICE, "gold": "0"}], "row 1 has gold '0'"),
        ([{**CHOICE, "gold": True}], "row 1 has gold True"),
        ([{**CHOICE, "gold": 0.0}], r"row 1 has gold 0\.0"),
        ([{**CHOICE, "choices": []}], r"row 1 has choices \[\]; expected a list of texts"),
        ([{**CHOICE, "choices": "ab"}], "row 1 has choices 'ab'"),
        ([{**CHOICE, "choices": ["a", 2]}], r"row 1 has choices \['a', 2\]"),
        ([{**CHOICE, "query": None}], "row 1 has query None; expected a text"),
        ([{**CONTEXTS, "gold": 2}], "row 1 has gold 2; .* right one of 2"),
        ([CHOICE, PAIR], "row 2 has sentence_good, sentence_bad, the first row query, choices"),
        ([{"text": 5}], "row 1 has text 5"),
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


def test_rows_are_numbered_as_in_the_file_whatever_the_limit(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", [*[CHOICE] * 9, {**CHOICE, "gold": 9}])
    with pytest.raises(DataError, match="row 10 has gold 9"):
        read_task(file, limit=2)


def test_the_table_is_printed_before_a_file_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megatron_completedp.convert.evaluate.evaluate", lambda *_, **__: [])
    (tmp_path / "file").touch()
    task, out = write(tmp_path / "piqa.jsonl", [CHOICE]), tmp_path / "file" / "scores.json"
    with pytest.raises(DataError, match=r"--out .*scores\.json cannot be written"):
        main(["--model", str(tmp_path), "--tasks", str(task), "--out", str(out)])
    assert capsys.readouterr().out.startswith("task")


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
