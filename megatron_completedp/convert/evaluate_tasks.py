"""Tasks to score a model on: JSONL files, what kind each is, and what guessing scores.

Needs no lm-eval: its settings for each kind are plain data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from megatron_completedp.errors import DataError

Row = Mapping[str, Any]

#: Row keys of each kind of task, with lm-eval's settings for it. Prompts end without a blank and
#: continuations start with one, as lm-eval's own tasks have it.
KINDS: dict[tuple[str, ...], dict[str, Any]] = {
    ("query", "choices", "gold"): {
        "output_type": "multiple_choice",
        "doc_to_text": "query",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    ("context_options", "continuation", "gold"): {
        "output_type": "multiple_choice",
        "doc_to_text": "gold",
        "doc_to_choice": "context_options",
        "doc_to_target": "continuation",
        "metric_list": [{"metric": "acc"}],
    },
    ("sentence_good", "sentence_bad"): {
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    },
    ("context", "continuation"): {
        "output_type": "loglikelihood",
        "doc_to_text": "context",
        "doc_to_target": "{{' ' + continuation}}",
        "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
    },
    ("text",): {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
    },
}

#: Keys whose values are several texts.
_LISTS = ("choices", "context_options")


@dataclass(frozen=True, kw_only=True)
class Task:
    """Rows of one file, and what kind they are."""

    name: str
    """The file's name without its endings."""
    file: str
    rows: tuple[Row, ...]
    """The rows that are scored."""
    of: int
    """Rows in the file."""
    too_long: int = 0
    """Rows left out, because the model has no room for what it would have to produce."""

    @property
    def sha256(self) -> str:
        """Of the rows that are scored, as JSON."""
        return hashlib.sha256(json.dumps(self.rows, sort_keys=True).encode()).hexdigest()

    @property
    def kind(self) -> tuple[str, ...]:
        """The entry of KINDS that the rows belong to."""
        kind = kind_of(self.rows[0])
        assert kind is not None, "read_task has checked it"
        return kind

    @property
    def chance(self) -> float | None:
        """Accuracy of a uniform guess; 0 for a free continuation, None where there is no such."""
        if self.kind == ("text",):
            return None
        if self.kind == ("context", "continuation"):
            return 0.0
        return sum(1 / len(self.pairs(row)) for row in self.rows) / len(self.rows)

    def pairs(self, row: Row) -> list[tuple[str, str]]:
        """(context, what the model is to produce after it) for `row`; none for plain text."""
        if self.kind == ("text",):
            return []  # scored in windows
        if self.kind == ("sentence_good", "sentence_bad"):
            return [("", row["sentence_good"]), ("", row["sentence_bad"])]
        if "context_options" in row:
            return [(context, row["continuation"]) for context in row["context_options"]]
        if "choices" in row:
            return [(row["query"], choice) for choice in row["choices"]]
        return [(row["context"], row["continuation"])]


def read_task(path: str | Path, limit: int | None = None) -> Task:
    """The task in a JSONL file (.gz, .zst by suffix), cut to `limit` rows spread evenly over it.

    Raises DataError, naming file and row, for a file that cannot be read or has no rows, for rows
    of no kind in KINDS or of another than the first one's, and for values their key cannot have.
    """
    rows = list(_read_rows(path))
    if not rows:
        raise DataError(f"{path} has no rows; expected one JSON object a line.")
    first = kind_of(rows[0])
    for number, row in enumerate(rows, start=1):
        problem = _problem(row, first)
        if problem is not None:
            raise DataError(f"{path}: row {number} {problem}.")
    of = len(rows)
    if limit is not None and limit < of:
        # Benchmarks come sorted by topic; the first rows would be one topic alone.
        rows = [rows[index * of // limit] for index in range(limit)]
    return Task(name=Path(path).name.split(".")[0], file=str(path), rows=tuple(rows), of=of)


def kind_of(row: Row) -> tuple[str, ...] | None:
    """The entry of KINDS that `row` belongs to, by its keys."""
    return next((keys for keys in KINDS if set(keys) <= row.keys()), None)


def _problem(row: Row, first: tuple[str, ...] | None) -> str | None:
    """What is wrong with a row of a file whose first row is of the kind `first`."""
    kind = kind_of(row)
    if kind is None:
        kinds = "; ".join(", ".join(keys) for keys in KINDS)
        return f"has the keys {', '.join(map(str, row))}; expected one of these sets: {kinds}"
    if kind != first:
        return f"has {', '.join(kind)}, the first row {', '.join(first or ())}; split the file"
    options: list[str] = []
    for key in kind:
        value = row[key]
        if key in _LISTS:
            if not (isinstance(value, list) and value and all(isinstance(v, str) for v in value)):
                return f"has {key} {value!r}; expected a list of texts, one at least"
            options = value
        elif key != "gold" and not isinstance(value, str):
            return f"has {key} {value!r}; expected a text"
    # True and "1" are no positions, whatever Python makes of them.
    if "gold" in kind and not (type(row["gold"]) is int and 0 <= row["gold"] < len(options)):
        return (
            f"has gold {row['gold']!r}; expected the position of the right one of {len(options)}, "
            f"0 to {len(options) - 1}"
        )
    return None


def _read_rows(path: str | Path) -> Iterator[Row]:
    try:
        with fsspec.open(str(path), "rt", encoding="utf-8", compression="infer") as stream:
            for number, line in enumerate(stream, start=1):
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} is no JSON object")
                yield row
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON lines: {error}.") from error
