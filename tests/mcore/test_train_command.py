"""The training command from end to end: a run, its restarts, its bad inputs, its divergence.

Runs whose process matters (a start from nothing, a kill, a resume) are started as a user would;
the rest call the same command in this process, which spares seconds of imports each.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_completedp.config.load import load_config
from megatron_completedp.data.jsonl import read_whole_rows
from megatron_completedp.mcore import engine as engine_module
from megatron_completedp.mcore.checkpoint import load_checkpoint
from megatron_completedp.mcore.engine import Engine
from megatron_completedp.mcore.platform import Platform
from megatron_completedp.mcore.store import list_checkpoints
from megatron_completedp.plan.run_plan import Plan
from tests.mcore.conftest import Command
from tests.mcore.train_runs import (
    INTERVAL,
    ROOT,
    STEPS,
    finish,
    losses,
    make_corpus,
    start,
    write_run,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """An uninterrupted run: its config, its folder and its log."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    config = write_run(folder, corpus)
    code, log = finish(start(config))
    assert code == 0, log
    return config, folder, log


def content(folder: Path) -> dict[str, str]:
    """Hash of every file under `folder`."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_run_trains_and_leaves_its_files(finished: tuple[Path, Path, str]) -> None:
    config, folder, _ = finished
    steps, values = zip(*losses(folder), strict=True)
    assert list(steps) == list(range(1, STEPS + 1))
    # 512 ids start at ln 512 = 6.24 nats; 20 steps learn which of them are common.
    assert abs(values[0] - 6.24) < 0.2
    assert values[-1] < values[0] - 0.7
    assert [step for step, _ in losses(folder, "eval")] == [STEPS // 2, STEPS]
    assert losses(folder, "eval")[-1][1] < values[0] - 0.7
    assert load_config(folder / "config.yaml") == load_config(config)
    plan = Plan.of(load_config(config))
    assert (folder / "plan.txt").read_text() == f"{plan}\n"
    modules = json.loads((folder / "plan.json").read_text())["modules"]
    assert len(modules) == len(plan.resolved.modules)
    kept = [path.name for path in list_checkpoints(folder / "checkpoints")]
    assert kept == [f"step_{STEPS - INTERVAL:08d}", f"step_{STEPS:08d}"]  # keep_last: 2


def test_the_start_up_log_counts_every_parameter_once(finished: tuple[Path, Path, str]) -> None:
    config, _, log = finished
    lines = log.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("group "))
    last = next(i for i, line in enumerate(lines) if line.endswith("= the whole model"))
    rows = [line.split() for line in lines[first + 1 : last]]
    assert [row[0] for row in rows] == [str(index) for index in range(len(rows))]
    total = sum(int(row[6].replace(",", "")) for row in rows)
    model = load_config(config).model
    assert total == model.parameters
    assert lines[last] == f"{len(rows)} groups, {total:,} parameters = the whole model"
    members = " ".join(word for row in rows for word in row[7:])
    assert all(module.value in members.split() for module in model.modules)


def test_a_killed_run_ends_as_if_nothing_had_happened(
    finished: tuple[Path, Path, str], corpus: Path, tmp_path: Path
) -> None:
    _, whole, _ = finished
    folder = tmp_path / "killed"
    config = write_run(folder, corpus)
    process = start(config)
    wait_for_step(folder / "metrics.jsonl", INTERVAL + 2)
    os.kill(process.pid, signal.SIGKILL)
    code, log = finish(process)  # times out while a helper process outlives the run
    assert code == -signal.SIGKILL, log
    assert losses(folder)[-1][0] < STEPS
    saved = list_checkpoints(folder / "checkpoints")[-1]
    code, log = finish(start(config))
    assert code == 0, log
    assert f"resumed from {saved}" in log
    # One process sums in one order: equal to the last bit, each step once.
    assert losses(folder) == losses(whole)
    assert losses(folder, "eval") == losses(whole, "eval")


def wait_for_step(metrics: Path, step: int, timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if any(row["step"] >= step for row in read_whole_rows(metrics)):
            return
        time.sleep(0.01)
    raise AssertionError(f"{metrics} did not reach step {step} within {timeout_s} s")


def test_a_finished_run_changes_nothing(
    finished: tuple[Path, Path, str], command: Command, caplog: pytest.LogCaptureFixture
) -> None:
    config, folder, _ = finished
    before = content(folder)
    with caplog.at_level(logging.INFO):
        assert command(config) == (0, "")
    assert f"this run had finished its {STEPS} steps before" in caplog.text
    assert content(folder) == before


def test_another_configuration_may_not_take_its_folder(
    finished: tuple[Path, Path, str], command: Command
) -> None:
    config, folder, _ = finished
    before = content(folder)
    code, message = command(config, "--lr", "0.02")
    assert code == 2
    assert f"error: run_dir {folder} already holds another run" in message
    assert "Choose another run_dir" in message
    assert content(folder) == before


def spoil_missing(corpus: Path) -> None:
    (corpus / "train.bin").unlink()


def spoil_empty(corpus: Path) -> None:
    (corpus / "train.idx").write_bytes(b"")


def spoil_truncated(corpus: Path) -> None:
    path = corpus / "train.bin"
    path.write_bytes(path.read_bytes()[:-1000])


def spoil_tokenizer(corpus: Path) -> None:
    path = corpus / "tokenizer.model"
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("spoil", "value", "expected"),
    [
        (spoil_missing, "train.bin does not exist", "copy it again"),
        (spoil_empty, "train.idx has 0 bytes; its manifest says", "Make the pair again"),
        (spoil_truncated, "train.bin has ", "its manifest says"),
        (spoil_tokenizer, "tokenizer.model is not a SentencePiece model", "copy it again"),
    ],
    ids=["missing", "empty", "truncated", "tokenizer"],
)
def test_bad_data(
    corpus: Path,
    tmp_path: Path,
    command: Command,
    spoil: Callable[[Path], None],
    value: str,
    expected: str,
) -> None:
    bad = tmp_path / "corpus"
    shutil.copytree(corpus, bad)
    spoil(bad)
    code, message = command(write_run(tmp_path / "run", bad))
    assert code == 1
    assert message.startswith("error: ")
    assert value in message
    assert expected in message
    assert not (tmp_path / "run").exists(), "checked before the folder is made"


@pytest.mark.parametrize(
    ("changes", "code", "parts"),
    [
        (
            {"model__vocab_size": 300},
            2,
            [
                "tokenizer.model has 512 ids but model.vocab_size is 300",
                "Set model.vocab_size to 512",
            ],
        ),
        ({"data__train": []}, 2, ["data.train is empty", "name at least one prefix"]),
        (
            {"data__valid": []},
            2,
            ["data.valid is empty but evaluation.interval is 10", "set the interval to 0"],
        ),
        ({"data__tokenizer": None}, 2, ["data.tokenizer is missing", "name the tokenizer"]),
        (
            {"evaluation__samples": 4000},
            1,
            ["evaluation.samples = 4000 sequences of 64 need 256,001", "Use fewer samples"],
        ),
        (
            {"parallel": {"tensor_model_parallel_size": 2}},
            2,
            ["The run has 1 processes", "2 (TP) x 1 (PP) = 2", "Start 2 processes or lower"],
        ),
        (
            {"evaluation__samples": 6},
            2,
            ["evaluation.samples is 6; expected a multiple of 4", "micro_batch_size", "e.g. 4"],
        ),
    ],
    ids=["vocab", "train", "valid", "tokenizer", "samples", "world", "batch"],
)
def test_bad_runs(
    corpus: Path,
    tmp_path: Path,
    command: Command,
    changes: dict[str, Any],
    code: int,
    parts: list[str],
) -> None:
    found, message = command(write_run(tmp_path / "run", corpus, **changes))
    assert found == code
    assert message.startswith("error: ")
    assert len(message.splitlines()) == 1
    for part in parts:
        assert part in message


def test_a_folder_with_foreign_files_stays_as_it_is(
    corpus: Path, tmp_path: Path, command: Command
) -> None:
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "thesis.tex").write_text("precious", encoding="utf-8")
    code, message = command(write_run(folder, corpus))
    assert code == 2
    assert f"run_dir {folder} is not empty and holds no config.yaml" in message
    assert "Choose a new or empty folder" in message
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


def test_a_parameter_without_a_role_stops_the_run(
    corpus: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = engine_module.build_model

    def with_temperature(*args: Any, **kwargs: Any) -> Any:
        chunks = build(*args, **kwargs)
        mlp = chunks[0].decoder.layers[1].mlp
        mlp.register_parameter("temperature", torch.nn.Parameter(torch.ones(5)))
        return chunks

    monkeypatch.setattr(engine_module, "build_model", with_temperature)
    code, message = command(write_run(tmp_path / "run", corpus))
    assert code == 1
    assert "decoder.layers.1.mlp.temperature" in message
    assert "(5,)" in message


#: With a warmup of half the run the first update has rate 0 and the second a fifth of the peak
#: (0.1): weights of 1e18 are finite and their products are not.
DIVERGING = {
    "hyperparams__lr": 1e19,
    "schedule": {"warmup_fraction": 0.5},
    "checkpoint": {"interval": 1},
}


@pytest.mark.parametrize(
    ("changes", "what", "last_good"),
    [
        (
            {"evaluation__interval": 0, "data__valid": []},
            "step 3: the loss is nan. Groups with non-finite gradients: every group. ",
            2,
        ),
        # lr 1e30 gives weights whose squares overflow in every norm: the loss stays at ln 512.
        (
            {"evaluation__interval": 0, "hyperparams__lr": 1e30},
            "step 3: the gradient norm is nan at a loss of 6.2383. "
            "Groups with non-finite gradients: embedding and attention_norm",
            2,
        ),
        # Seen before the checkpoint of the same step is written.
        ({"evaluation__interval": 1}, "step 2: the validation loss is nan. ", 1),
    ],
    ids=["loss", "gradient", "validation"],
)
def test_divergence_names_step_groups_and_the_last_good_checkpoint(
    corpus: Path,
    tmp_path: Path,
    command: Command,
    platform: Platform,
    changes: dict[str, Any],
    what: str,
    last_good: int,
) -> None:
    folder = tmp_path / "run"
    config = write_run(folder, corpus, **{**DIVERGING, **changes})
    code, message = command(config)
    kept = folder / "checkpoints" / f"step_{last_good:08d}"
    assert code == 1
    assert message.startswith(f"error: {what}")
    assert message.endswith(f"The last good checkpoint is {kept}.\n")
    event = read_whole_rows(folder / "metrics.jsonl")[-1]
    assert event["kind"] == "event"
    assert message == f"error: {event['message']}\n"
    assert list_checkpoints(folder / "checkpoints")[-1] == kept
    plan = Plan.of(load_config(config))
    engine = Engine(plan.config, plan.resolved, platform)
    load_checkpoint(engine, kept)
    assert engine.step == last_good


def test_divergence_before_any_checkpoint_says_so(
    corpus: Path, tmp_path: Path, command: Command
) -> None:
    changes = {**DIVERGING, "checkpoint": {"interval": 0}, "evaluation__interval": 0}
    code, message = command(write_run(tmp_path / "run", corpus, **changes))
    assert code == 1
    assert message.endswith("No checkpoint was written yet.\n")


def test_runs_of_one_process_leave_no_threads_behind(corpus: Path, tmp_path: Path) -> None:
    """A search's worker trains hundreds of runs; gloo's threads of old groups would slow each."""
    configs = [str(write_run(tmp_path / name, corpus, checkpoint__interval=0)) for name in "abc"]
    code = f"""
import os
from pathlib import Path
from megatron_completedp.study.points import train_point
for config in {configs!r}:
    train_point(Path(config), ranks=1, stop=lambda: False)
    print("threads", len(os.listdir("/proc/self/task")))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    counts = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("threads")]
    assert len(counts) == 3, done.stderr
    assert counts[1] == counts[2], counts  # the first run starts threads that stay, once
