"""Score a Hugging Face folder on local files with lm-eval, chance beside every score.

Nothing is downloaded, and lm-eval computes every score; `evaluate_tasks` has the tasks in its terms
and the chance floors, which it does not have.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from megatron_completedp.convert.evaluate_tasks import KINDS, Row, Task, read_task
from megatron_completedp.core.render import text_table
from megatron_completedp.data.atomic import atomic_write
from megatron_completedp.errors import ConfigError, DataError

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
    print(table(scores))
    if flags.out is not None:
        _write(flags.out, as_json(flags.model, scores))
    return 0


def evaluate(
    model: Path, tasks: Sequence[Task], *, device: str, dtype: str, batch_size: int
) -> list[Score]:
    """Score the model in the folder `model`, whose tokenizer lies beside it, on every task.

    Rows with a continuation longer than the model's longest sequence are left out and counted.
    Raises ConfigError when lm-eval is not installed, two tasks share a name, `model` is no folder
    with a config.json, or the device is not there, and DataError for a task without a row that
    fits.
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


def _write(path: Path, content: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as stream:
            stream.write(json.dumps(content, indent=1).encode())
    except OSError as error:
        raise DataError(
            f"--out {path} cannot be written ({error}); the table above has the scores."
        ) from error


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
    lm = HFLM(pretrained=str(model), device=device, dtype=dtype, batch_size=batch_size)
    # lm-eval takes another device where this one is missing; cuda is cuda:0.
    if str(lm.device).removesuffix(":0") != device.removesuffix(":0"):
        raise ConfigError(
            f"--device is {device}, which this machine has not; expected cpu, or a GPU that torch "
            "sees, such as cuda:0."
        )
    return lm


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


def _number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)
