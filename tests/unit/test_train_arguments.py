"""What the training command says before it imports torch: the dry run and bad values."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from config_samples import small_tree

from megatron_completedp.config.cli import run_command
from megatron_completedp.plan.__main__ import main as plan_main
from megatron_completedp.train.__main__ import main

#: Runs the command where torch, numpy and megatron cannot be found.
GUARDED = """
import runpy, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "numpy", "megatron"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
runpy.run_module("megatron_completedp.train", run_name="__main__", alter_sys=True)
"""


def write(tmp_path: Path, **changes: Any) -> str:
    path = tmp_path / "run.yaml"
    tree = small_tree(run_dir=str(tmp_path / "run"), **changes)
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return str(path)


def guarded(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", GUARDED, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_dry_run_is_the_plan_without_torch_or_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"train": ["no/such/prefix"], "valid": ["none"], "tokenizer": "no/such.model"}
    config = write(tmp_path, data=data)
    done = guarded("--config", config, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert plan_main(["--config", config]) == 0
    assert done.stdout == capsys.readouterr().out
    assert "unembedding" in done.stdout
    assert not (tmp_path / "run").exists()
    # Negative control: the same guard stops a run that means to train.
    started = guarded("--config", config)
    assert started.returncode != 0
    assert "ModuleNotFoundError" in started.stderr


@pytest.mark.parametrize(
    ("changes", "value", "expected", "fix"),
    [
        (
            {"parallel.tensor_model_parallel_size": 3},
            "model.num_attention_heads is 8",
            "parallel.tensor_model_parallel_size = 3 does not divide",
            "use a TP size that divides it",
        ),
        (
            {"parallel.pipeline_model_parallel_size": 3},
            "model.num_layers is 4",
            "3 pipeline stages x 1 virtual chunks = 3 do not divide",
            "choose sizes whose product divides it",
        ),
        ({"zzz": 1}, "unknown key zzz", "expected one of run_dir, seed", "base, hyperparams"),
        (
            {"training.global_batch_sise": 8},
            "unknown key training.global_batch_sise",
            "did you mean",
            "training.global_batch_size",
        ),
        (
            {"hidden_size": 8},
            "unknown key hidden_size",
            "did you mean",
            "model.hidden_size",
        ),
        (
            {"multipliers.types": {"q": {"one_minus_beta1_mult": 20}}},
            "beta1 of q in layer 0 becomes -1",
            "Expected a value in (0, 1)",
            "lower the one_minus_beta multiplier",
        ),
        (
            {"training": {"global_batch_size": 8}},
            "training.train_tokens and training.train_steps are both missing",
            "the length of the run is unknown",
            "Give one of them",
        ),
    ],
    ids=["heads", "layers", "unknown", "near_miss", "wrong_section", "beta", "length"],
)
def test_bad_values(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    value: str,
    expected: str,
    fix: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "--config", write(tmp_path, **changes)])
    assert run_command(main) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert len(message.splitlines()) == 1
    for part in (value, expected, fix):
        assert part in message
    assert not (tmp_path / "run").exists()


def test_other_ranks_let_rank_zero_speak_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their error comes out too, for where rank 0 does not share it, but late."""
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setattr(sys, "argv", ["train", "--config", write(tmp_path, zzz=1)])
    for rank in ("0", "3"):
        monkeypatch.setenv("RANK", rank)
        assert run_command(main) == 2
        assert "unknown key zzz" in capsys.readouterr().err
    assert len(waited) == 1
    assert waited[0] > 1


def test_changes_to_allow_are_checked_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    allow = ["--allow-hp-change", "q.lr", "--allow-hp-change"]
    command = ["train", "--config", write(tmp_path), *allow]
    monkeypatch.setattr(sys, "argv", [*command, "q.lrate"])
    assert run_command(main) == 2
    assert "--allow-hp-change q.lrate: expected module.field, such as" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*command, "*.beta2", "--dry-run"])
    assert run_command(main) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--world-size", "8"], "describe a dry run; add --dry-run"),
        (["--all-ranks"], "describe a dry run; add --dry-run"),
        (["--dry-run", "--all-ranks"], "--all-ranks is of the --world-size to simulate"),
    ],
)
def test_flags_of_a_simulated_world_need_their_dry_run(
    flags: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "--config", write(tmp_path), *flags])
    assert run_command(main) == 2
    assert message in capsys.readouterr().err
