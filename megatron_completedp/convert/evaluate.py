"""Score a Hugging Face folder on local files with lm-eval, chance beside every score.

Nothing is downloaded: a task is a JSONL file, and the keys of its rows say what kind it is. lm-eval
computes every score; here are the tasks in its terms and the chance floors, which it does not have.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import fsspec
import tyro

from megatron_completedp.core.render import text_table
from megatron_completedp.data.atomic import atomic_write
from megatron_completedp.errors import ConfigError, DataError

Row = Mapping[str, Any]

PROG = "tools/evaluate.py"
DESCRIPTION = """\
Score a Hugging Face folder on local JSONL files with lm-eval, offline, with the score of guessing
beside every accuracy. The keys of the rows say what a file is:
  query, choices, gold                    choose a continuation of the query (ARC, PIQA, BoolQ, ...)
  context_options, continuation, gold     choose a context for the continuation (WinoGrande)
  sentence_good, sentence_bad             prefer the first (BLiMP)
  context, continuation                   produce the continuation (LAMBADA)
  text                                    bits per byte

Example:
  tools/evaluate.py --model exports/proxy --tasks eval/blimp.jsonl.zst --tasks eval/piqa.jsonl \\
      --limit 2000 --out exports/proxy/scores.json
"""

#: Row keys of each kind of task, with lm-eval's settings for it. Prompts end without a blank and
#: continuations start with one, as lm-eval's own tasks have it.
KINDS: dict[tuple[str, ...], dict[str, Any]] = {
    ("query", "choices", "gold"): {
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
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
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{' ' + continuation}}",
        "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
    },
    ("text",): {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
    },
}


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
        return next(keys for keys in KINDS if set(keys) <= self.rows[0].keys())

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


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric of one task."""

    task: str
    metric: str
    value: float
    standard_error: float | None
    """Over the rows; None where lm-eval gives none."""
    chance: float | None
    """What guessing scores; None for what cannot be guessed."""
    rows: int
    of: int
    too_long: int
    """Rows left out, as in Task."""
    sha256: str
    """Of the rows that were scored."""

    @property
    def above_chance(self) -> float | None:
        """(value - chance) / standard error; 2 or more is hard to get by luck."""
        if self.chance is None or not self.standard_error:
            return None
        return (self.value - self.chance) / self.standard_error


@dataclass(frozen=True, kw_only=True)
class EvaluateFlags:
    """Flags of the command."""

    model: Path
    """Folder that convert_checkpoint.py to-hf wrote."""
    tasks: tyro.conf.UseAppendAction[tuple[Path, ...]]
    """A JSONL file of rows to score (.gz and .zst too); can be repeated."""
    limit: int | None = None
    """At most this many rows of each file, spread evenly over it."""
    out: Path | None = None
    """Write the scores to this JSON file too."""
    device: str = "cpu"
    """Where the model runs, such as cuda:0."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of its weights and activations."""
    batch_size: int = 16
    """Sequences in one forward pass."""


def main(argv: Sequence[str]) -> int:
    """Score the model that `argv` names, print the table. Returns the exit code."""
    flags = tyro.cli(EvaluateFlags, prog=PROG, description=DESCRIPTION, args=list(argv))
    if flags.limit is not None and flags.limit < 1:
        raise ConfigError(f"--limit is {flags.limit}; expected at least 1 row, or no --limit.")
    tasks = [read_task(file, flags.limit) for file in flags.tasks]
    scores = evaluate(
        flags.model, tasks, device=flags.device, dtype=flags.dtype, batch_size=flags.batch_size
    )
    if flags.out is not None:
        flags.out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(flags.out) as stream:
            stream.write(json.dumps(as_json(flags.model, scores), indent=1).encode())
    print(table(scores))
    return 0


def read_task(path: str | Path, limit: int | None = None) -> Task:
    """The task in a JSONL file (.gz, .zst by suffix), cut to `limit` rows spread evenly over it.

    Raises DataError for a file that cannot be read, has no rows, or rows of no kind in KINDS.
    """
    rows = list(_read_rows(path))
    if not rows:
        raise DataError(f"{path} has no rows; expected one JSON object a line.")
    of = len(rows)
    if limit is not None and limit < of:
        # Benchmarks come sorted by topic; the first rows would be one topic alone.
        rows = [rows[index * of // limit] for index in range(limit)]
    for number, row in enumerate(rows, start=1):
        if not any(set(keys) <= row.keys() for keys in KINDS):
            kinds = "; ".join(", ".join(keys) for keys in KINDS)
            raise DataError(
                f"{path}: row {number} has the keys {', '.join(map(str, row))}; expected one of "
                f"these sets: {kinds}."
            )
    return Task(name=Path(path).name.split(".")[0], file=str(path), rows=tuple(rows), of=of)


def evaluate(
    model: Path, tasks: Sequence[Task], *, device: str, dtype: str, batch_size: int
) -> list[Score]:
    """Score the model in the folder `model`, whose tokenizer lies beside it, on every task.

    Rows with a continuation longer than the model's longest sequence are left out and counted.
    Raises ConfigError when lm-eval is not installed, two tasks share a name, or `model` is no
    folder with a config.json, and DataError for a task without a row that fits.
    """
    names = [task.name for task in tasks]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two files are called {doubled[0]}; rename one: scores go by the name.")
    if not (model / "config.json").exists():
        raise ConfigError(
            f"{model} has no config.json; expected a folder written by convert_checkpoint.py to-hf."
        )
    lm = _load(model, device=device, dtype=dtype, batch_size=batch_size)
    tasks = [_fitting(task, lm) for task in tasks]
    results = _run(lm, tasks)
    return [score for task in tasks for score in _scores(task, results[task.name])]


def table(scores: Iterable[Score]) -> str:
    """The scores as text, chance floors beside them."""
    rows = [
        [
            score.task,
            f"{score.rows:,} of {score.of:,}",
            f"{score.too_long:,}",
            score.metric,
            _number(score.value),
            _number(score.standard_error),
            _number(score.chance),
            _number(score.above_chance, "+.1f"),
        ]
        for score in scores
    ]
    header = [
        "task",
        "rows",
        "too long",
        "metric",
        "value",
        "+-",
        "chance",
        "standard errors above",
    ]
    return text_table(header, rows, left=1)


def as_json(model: Path, scores: Iterable[Score]) -> dict[str, Any]:
    """The scores as plain data."""
    rows = [{**asdict(score), "above_chance": score.above_chance} for score in scores]
    return {"model": str(model), "scores": rows}


def _load(model: Path, *, device: str, dtype: str, batch_size: int) -> Any:
    """The model as lm-eval takes it."""
    # Read once, when huggingface_hub is imported: no look at the hub for what lies here.
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ConfigError(
            f"evaluation needs lm-eval ({error}); pip install 'megatron_completedp[evaluate]'."
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return HFLM(pretrained=str(model), device=device, dtype=dtype, batch_size=batch_size)


def _fitting(task: Task, lm: Any) -> Task:
    """`task` with the rows whose continuations the model has room for."""

    def length(context: str, text: str) -> int:
        if not context:
            return len(lm.tok_encode(f" {text}", add_special_tokens=False))
        # lm-eval's own split, private or not: tokens may join over the seam.
        return len(lm._encode_pair(context, f" {text}")[1])

    def fits(row: Row) -> bool:
        return all(length(*pair) <= lm.max_length for pair in task.pairs(row))

    rows = tuple(row for row in task.rows if fits(row))
    if not rows:
        raise DataError(
            f"{task.file}: every row has a continuation of more than {lm.max_length} tokens, the "
            "model's longest sequence; evaluate a model of longer sequences, or another file."
        )
    return replace(task, rows=rows, too_long=len(task.rows) - len(rows))


def _run(lm: Any, tasks: Sequence[Task]) -> dict[str, dict[str, Any]]:
    """lm-eval's results by task name."""
    import datasets
    from lm_eval import simple_evaluate

    results = simple_evaluate(
        model=lm,
        tasks=[
            {
                "task": task.name,
                "custom_dataset": _dataset(datasets, task),
                "test_split": "test",
                "num_fewshot": 0,
                **KINDS[task.kind],
            }
            for task in tasks
        ],
        log_samples=False,
        bootstrap_iters=100,  # for perplexities; accuracies have a closed form
    )
    assert results is not None, "only ranks other than 0 get no results"
    found: dict[str, dict[str, Any]] = results["results"]
    return found


def _dataset(datasets: Any, task: Task) -> Any:
    """The rows as lm-eval takes them, with the keys of their kind alone."""
    columns = {key: [row[key] for row in task.rows] for key in task.kind}
    return lambda **_: datasets.DatasetDict({"test": datasets.Dataset.from_dict(columns)})


def _scores(task: Task, results: Mapping[str, Any]) -> Iterator[Score]:
    for entry in KINDS[task.kind]["metric_list"]:
        metric = entry["metric"]
        error = results.get(f"{metric}_stderr,none")
        known = isinstance(error, float) and math.isfinite(error) and error > 0
        yield Score(
            task=task.name,
            metric=metric,
            value=float(results[f"{metric},none"]),
            standard_error=error if known else None,
            chance=task.chance if metric.startswith("acc") else None,
            rows=len(task.rows),
            of=task.of,
            too_long=task.too_long,
            sha256=task.sha256,
        )


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


def _number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)
