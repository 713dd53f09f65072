"""A search trained for real, a tiny one: its trials, its ledger, its recipe; stopped and joined."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

pytest.importorskip("optuna")

from optuna.trial import FrozenTrial, TrialState

from megatron_completedp.config.load import build, load_config
from megatron_completedp.config.recipe import load_recipe
from megatron_completedp.errors import REQUEUE_EXIT_CODE
from megatron_completedp.search.access import Search, read
from megatron_completedp.search.settings import SearchSettings
from megatron_completedp.study.points import outcome

from .train_runs import ROOT, make_corpus, make_heldout, write_run

TRIALS = 4


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """search.yaml of four trials, its run and its text; the split to report on is the other one."""
    folder = tmp_path_factory.mktemp("search")
    corpus = make_corpus(folder / "corpus")
    write_run(folder / "run", corpus)
    file = folder / "search.yaml"
    tree = {
        "run": "run.yaml",
        "trials": TRIALS,
        "workers": 2,
        "heldout": [str(make_heldout(corpus))],
        "sampler_options": {"start_replicates": 2, "round_size": 2},
    }
    file.write_text(yaml.safe_dump(tree))
    return file


def command(name: str, config: Path, out: Path, *flags: str) -> subprocess.Popen[str]:
    flags = ("--config", str(config), "--out", str(out), *flags)
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_completedp.search", name, *flags],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=600)
    return process.returncode, output


def trials_of(config: Path, out: Path, run: str = "run.yaml") -> list[FrozenTrial]:
    tree = yaml.safe_load(config.read_text())
    tree["run"] = str(config.with_name(run))
    return read(Search(build(SearchSettings, tree), out)).get_trials(deepcopy=False)


@pytest.fixture(scope="module")
def searched(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "search"
    code, output = finish(command("run", config, out))
    assert code == 0, output
    return out


def test_a_trials_value_is_what_its_run_ended_with(config: Path, searched: Path) -> None:
    found = trials_of(config, searched)
    assert [trial.state for trial in found] == [TrialState.COMPLETE] * TRIALS
    for trial in found:
        (file,) = trial.user_attrs["configs"]
        ended = outcome(load_config(searched / file))
        assert ended is not None
        value = math.log(512) if ended.diverged else ended.loss
        assert trial.value == value
        assert trial.user_attrs["diverged"] == ended.diverged
        assert trial.user_attrs["steps"] == 20
        assert trial.user_attrs["seconds"] > 0
    # The start twice, with two seeds; then children of other numbers.
    assert found[0].params == found[1].params
    assert found[0].value != found[1].value
    assert found[2].params != found[0].params


def test_status_says_what_it_cost(config: Path, searched: Path) -> None:
    target = str(config.with_name("run.yaml"))
    code, output = finish(command("status", config, searched, "--target", target))
    assert code == 0, output
    assert f"{TRIALS} of {TRIALS} trials begun" in output
    # Every trial is as long as the run itself.
    assert "400.000% of the" in output


def test_the_recipe_is_the_best_points_with_a_loss_held_out(
    config: Path, searched: Path, tmp_path: Path
) -> None:
    file = tmp_path / "recipe.yaml"
    flags = ["--to", str(file), "--heldout-runs", "2"]
    code, output = finish(command("recipe", config, searched, *flags))
    assert code == 0, output
    recipe, origin = load_recipe(file)
    assert not origin.hand_written
    provenance = recipe.provenance
    assert provenance.trials == TRIALS
    assert provenance.loss is not None
    assert provenance.heldout_loss is not None
    assert provenance.heldout_loss_standard_error is not None
    # No trial had the seeds of the held-out runs.
    used = {load_config(path).seed for path in searched.glob("trials/*.yaml")}
    fresh = {load_config(path).seed for path in searched.glob("heldout/*.yaml")}
    assert len(fresh) == 2
    assert not used & fresh
    assert set(provenance.seeds) <= used


def test_a_stopped_worker_gives_its_trial_back_and_another_goes_on_with_it(
    config: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    long = config.with_name("long.yaml")
    tree = yaml.safe_load(config.with_name("run.yaml").read_text())
    tree["training"]["train_steps"] = 200
    long.write_text(yaml.safe_dump(tree))
    flags = ["--run", str(long), "--trials", "1"]
    process = command("worker", config, out, *flags)
    metrics = out / "trials" / "0000" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and '"step": 1' in metrics.read_text()):
        assert time.monotonic() < deadline, "nothing was trained in five minutes"
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == REQUEUE_EXIT_CODE, output
    code, output = finish(command("worker", config, out, *flags))
    assert code == 0, output
    assert f"resumed from {out / 'trials' / '0000' / 'checkpoints'}" in output
    first, second = trials_of(config, out, long.name)
    assert first.state == TrialState.FAIL
    assert first.user_attrs["stopped"] is True
    assert second.params == first.params
    # No step was made twice, and none is left out of the account.
    assert first.user_attrs["steps"] + second.user_attrs["steps"] == 200
