"""Transfer studies trained for real, tiny ones: resumed, shared, stopped, diverged, in parallel."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_completedp.check.transfer import run
from megatron_completedp.check.transfer_settings import TransferSettings
from megatron_completedp.config.load import load_config
from megatron_completedp.errors import REQUEUE_EXIT_CODE, CompletedPError, ConfigError
from megatron_completedp.study.points import outcome, train_point
from megatron_completedp.study.report import Report
from megatron_completedp.study.results import Results
from megatron_completedp.study.tasks import Point, train_points

from .train_runs import ROOT, finish, make_corpus, start, write_run

#: So large a learning rate that the run ends above ln(vocab_size).
BEYOND = 12.0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """The YAML of the base run; 20 steps of width 64 at 512 tokens."""
    return write_run(tmp_path_factory.mktemp("base") / "run", corpus)


def settings(base: Path, **changes: Any) -> TransferSettings:
    """A study of four runs at its start: 2 layers and 1, three values of which one diverges."""
    values = {
        "run": str(base),
        "axis": "depth",
        "sizes": (1, 2),
        "log2_multiples": (-1.0, 0.0, BEYOND),
        "max_added": 0,
        "seeds": (1,),
        "parametrizations": ("completedp",),
        "workers": 2,
    }
    return TransferSettings(**{**values, **changes})


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, base: Path) -> tuple[Path, Report]:
    out = tmp_path_factory.mktemp("study")
    return out, run(settings(base), out)


def rows(out: Path) -> dict[str, dict[str, Any]]:
    lines = (out / "results.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    found = [json.loads(line) for line in lines]
    assert len({row["id"] for row in found}) == len(found), "a run was trained twice"
    return {row["id"]: row for row in found}


def test_a_study_trains_every_point_in_its_own_folder(study: tuple[Path, Report]) -> None:
    out, _ = study
    found = rows(out)
    assert len(found) == 6
    for name, row in found.items():
        metrics = (out / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8")
        last = json.loads(metrics.splitlines()[-1])
        if not row["diverged"]:
            assert row["loss"] == last["loss"] < math.log(512)
            assert row["steps"] == last["step"] == 20


def test_a_diverged_point_is_a_result_and_no_number(study: tuple[Path, Report]) -> None:
    out, report = study
    beyond = [row for row in rows(out).values() if row["log2_multiple"] == BEYOND]
    assert [row["diverged"] for row in beyond] == [True, True]
    assert [row["loss"] for row in beyond] == [None, None]
    # Beside it nothing is bracketed, and no optimum is read off an edge.
    assert not report.passed
    assert "not bracketed" in report.findings[0].note


def test_a_finished_point_is_never_run_again(study: tuple[Path, Report], base: Path) -> None:
    out, _ = study
    before = (out / "results.jsonl").read_bytes()
    written = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/metrics.jsonl")}
    run(settings(base), out)
    assert (out / "results.jsonl").read_bytes() == before
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_results_of_another_config_are_refused(
    study: tuple[Path, Report], tmp_path: Path, corpus: Path
) -> None:
    other = write_run(tmp_path / "run", corpus, hyperparams__lr=0.02)
    with pytest.raises(ConfigError, match=r"run\.hyperparams\.lr was 0\.01, is now 0\.02"):
        run(settings(other), study[0])


def test_a_point_trains_as_the_command_does_whatever_ran_before(
    study: tuple[Path, Report], tmp_path: Path
) -> None:
    """The workers' process has trained other points; a process of its own gives the same bits."""
    out, _ = study
    # The last row that finished: its worker had trained another before it.
    name, row = [item for item in rows(out).items() if not item[1]["diverged"]][-1]
    config = tmp_path / f"{name}.yaml"
    tree = yaml.safe_load((out / "runs" / f"{name}.yaml").read_text(encoding="utf-8"))
    config.write_text(yaml.safe_dump({**tree, "run_dir": str(tmp_path / name)}))
    assert finish(start(config))[0] == 0
    alone = outcome(load_config(config))
    assert alone is not None
    assert alone.loss == row["loss"]


def test_a_run_that_finished_before_its_row_was_written_is_only_read(
    study: tuple[Path, Report],
) -> None:
    out, _ = study
    name, row = next((n, r) for n, r in rows(out).items() if not r["diverged"])
    file = out / "runs" / name / "metrics.jsonl"
    before = file.stat().st_mtime_ns
    config = out / "runs" / f"{name}.yaml"
    assert train_point(config, ranks=1, stop=lambda: False)["loss"] == row["loss"]
    assert file.stat().st_mtime_ns == before


@pytest.mark.slow
def test_several_ranks_train_through_torchrun_and_stop_when_asked(
    study: tuple[Path, Report], tmp_path: Path
) -> None:
    out, _ = study
    name, row = next((n, r) for n, r in rows(out).items() if not r["diverged"])
    tree = yaml.safe_load((out / "runs" / f"{name}.yaml").read_text(encoding="utf-8"))
    file = tmp_path / "point.yaml"
    tree["run_dir"] = str(tmp_path / "point")
    tree["parallel"]["tensor_model_parallel_size"] = 2
    file.write_text(yaml.safe_dump(tree))

    def is_training() -> bool:
        return any(tmp_path.glob("point/metrics.jsonl"))

    assert train_point(file, ranks=2, stop=is_training) is None
    assert list(tmp_path.glob("point/checkpoints/step_*")), "stopped halfway, it has saved"
    found = train_point(file, ranks=2, stop=lambda: False)
    # Sums over two ranks are rounded in another order; 20 steps amplify that to far below 1e-3.
    assert found["loss"] == pytest.approx(row["loss"], abs=1e-3)


@pytest.fixture
def stopped(tmp_path: Path, base: Path) -> tuple[Path, list[str], int]:
    """A study told to stop while it trained its first runs: its folder, command and exit code."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "megatron_completedp.check", "transfer", "--run", str(base)]
    command += ["--axis", "duration", "--sizes", "10240", "102400", "--max-added", "0"]
    command += ["--seeds", "1", "--parametrizations", "completedp", "--workers", "2"]
    command += ["--log2-multiples", "-1", "0", "1", "--out", str(out)]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not any('"step"' in file.read_text() for file in out.glob("runs/*/metrics.jsonl")):
        assert time.monotonic() < deadline, "nothing was trained in two minutes"
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    return out, command, process.returncode


def test_a_stopped_study_goes_on_where_it_was(stopped: tuple[Path, list[str], int]) -> None:
    out, command, code = stopped
    assert code == REQUEUE_EXIT_CODE
    finished = rows(out)
    saved = [path.parent.name for path in out.glob("runs/*/checkpoints")]
    assert saved, "a run that was stopped halfway has saved"
    assert not set(saved) & set(finished)
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300, check=False
    )
    assert done.returncode in (0, 1)  # noise decides the verdict
    assert len(rows(out)) == 6
    log = "".join(path.read_text() for path in out.glob("runs/logs/*.log"))
    assert all(f"resumed from {out / 'runs' / name}" in log for name in saved)


@pytest.mark.slow
def test_two_commands_share_a_study(tmp_path: Path, base: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "megatron_completedp.check", "transfer", "--run", str(base)]
    command += ["--axis", "depth", "--sizes", "1", "2", "--max-added", "0", "--workers", "1"]
    command += ["--parametrizations", "completedp", "--seeds", "1"]
    command += ["--log2-multiples", "-1", "0", "1", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    both = [subprocess.Popen(command, cwd=ROOT, env=environment) for _ in range(2)]
    codes = [process.wait(timeout=300) for process in both]
    # The same rows, so the same verdict, from both; `rows` holds that no run was trained twice.
    assert codes[0] == codes[1] != 2
    assert len(rows(out)) == 6
    logs = list(out.glob("runs/logs/*.log"))
    assert logs


def test_a_worker_says_why_a_run_cannot_be_trained(tmp_path: Path, base: Path) -> None:
    config = load_config(base)
    data = replace(config.data, train=(str(tmp_path / "nothing"),))
    point = Point("point", replace(config, data=data, run_dir=str(tmp_path / "run")), {})
    results = Results(tmp_path / "results.jsonl", {})
    with pytest.raises(CompletedPError, match="nothing"):
        train_points([point], results, folder=tmp_path, workers=1, ranks=1)
    assert results.rows() == []
