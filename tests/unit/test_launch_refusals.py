"""What `launch` refuses before anything is queued, and what it says where SLURM refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from launch_samples import fake, launch, run_script, write_config

#: A model that no 2 GPUs hold, in a batch that 16 ranks divide.
LARGE: dict[str, Any] = {
    "base": None,
    "model": {
        "num_layers": 32,
        "hidden_size": 8192,
        "ffn_hidden_size": 22016,
        "num_attention_heads": 64,
        "head_dim": 128,
        "vocab_size": 50277,
        "seq_length": 2048,
    },
    "training": {
        "precision": "bf16",
        "global_batch_size": 64,
        "train_steps": 100,
        "device": "cuda",
    },
    "parallel": {"use_distributed_optimizer": True},
}


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        ("array", "--nodes"),
        ("array", "--processes-per-node"),
        ("array", "--tries"),
        ("train", "--gpus-per-task"),
    ],
)
def test_a_flag_that_would_do_nothing_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, flag: str
) -> None:
    needed = ["--tasks", "2"] if command == "array" else ["--config", "run.yaml"]
    with pytest.raises(SystemExit) as left:
        launch(monkeypatch, command, *needed, flag, "2", "--dry-run", "--", "search")
    assert left.value.code == 2
    assert flag in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "changes", "parts"),
    [
        (
            ["--nodes", "3"],
            {"parallel.tensor_model_parallel_size": 2},
            ["the world size is 3", "= 2 does not divide", "start a multiple of 2 ranks"],
        ),
        (
            ["--nodes", "16"],
            {},
            ["training.global_batch_size is 8", "expected a multiple of 16", "e.g. 16"],
        ),
        (["--nodes", "0"], {}, ["nodes is 0", "expected at least 1"]),
        (["--time-limit-hours", "-1"], {}, ["time_limit_hours is -1.0", "positive number"]),
        (["--container-mounts", "/a:/b"], {}, ["container names no image"]),
        (["--sbatch", "--"], {}, ["required argument: tasks"]),
        (
            ["--time-limit-hours", "0.05"],
            {},
            ["time_limit_hours is 0.05, 180 s", "stop_lead_s is 120", "more than 120 + 60 s"],
        ),
        (["--stop-lead-s", "0"], {}, ["stop_lead_s is 0", "expected at least 1"]),
        (["--stop-lead-s", "70000"], {}, ["stop_lead_s is 70000", "at most 65535"]),
        (["--utilization", "0.5"], {}, ["--utilization is 0.5", "no --gpu to estimate for"]),
        (["--", "--dry-run"], {}, ["that does not train", "before the --"]),
        (["--gpu", "H1000"], {}, ["--gpu is 'H1000'", "expected one of A100-80"]),
        (["--gpu", "H100"], {}, ["training.precision is fp32", "--training.precision bf16"]),
        (
            ["--gpu", "H100", "--nodes", "2"],
            LARGE,
            ["parameters do not fit on 2 x H100", "GB more than the 77.0 GB", "would do."],
        ),
        (
            ["--gpu", "H100", "--processes-per-node", "16"],
            LARGE,
            ["TP 1, PP 1, DP 16", "GB more than the 77.0 GB of H100", "fits: --tensor-model"],
        ),
    ],
    ids=[
        "tp", "batch", "nodes", "time", "mounts", "empty", "short", "lead", "long", "utilization",
        "dry_run", "gpu", "fp32", "no_layout", "layout"
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_anything_is_queued(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    changes: dict[str, Any],
    parts: list[str],
) -> None:
    fake(tmp_path / "bin", monkeypatch, sbatch=f"touch {tmp_path}/called")
    config = str(write_config(tmp_path, **changes))
    if arguments == ["--sbatch", "--"]:
        with pytest.raises(SystemExit) as left:
            launch(monkeypatch, "array", "--sbatch", "qos=high")
        assert left.value.code == 2
    else:
        assert launch(monkeypatch, "train", "--config", config, *arguments) == 2
        message = capsys.readouterr().err
        for part in parts:
            assert part in message, message
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["trian"], ["unknown command 'trian'; did you mean train?"]),
        (["array", "--tasks", "0", "--", "search"], ["--tasks is 0"]),
        (["array", "--tasks", "2"], ["command is missing", "preprocess, ladder, search"]),
        (["array", "--tasks", "2", "--", "serch"], ["command is serch"]),
        (["status"], ["status of which run?"]),
    ],
)
def test_bad_commands(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    parts: list[str],
) -> None:
    assert launch(monkeypatch, *arguments) == 2
    message = capsys.readouterr().err
    for part in parts:
        assert part in message


def test_without_slurm_the_message_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launch(monkeypatch, "train", "--config", str(write_config(tmp_path))) == 1
    message = capsys.readouterr().err
    assert "sbatch is not on PATH" in message
    assert "launch/local.sh" in message


def test_a_refusal_of_sbatch_is_shown_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sbatch = "echo 'sbatch: error: invalid partition specified: gpu' >&2; exit 1"
    fake(tmp_path / "bin", monkeypatch, sbatch=sbatch, squeue="exit 1")
    config = str(write_config(tmp_path))
    assert launch(monkeypatch, "train", "--config", config, "--partition", "gpu") == 1
    message = capsys.readouterr().err
    assert "invalid partition specified: gpu" in message
    assert "--partition=gpu" in message


@pytest.mark.parametrize(
    ("device", "said"),
    [("gpu", "COMPLETEDP_DEVICE is 'gpu'; expected cpu or cuda"), ("cpu", "no Python 3.11")],
)
def test_the_quickstart_takes_no_other_device(tmp_path: Path, device: str, said: str) -> None:
    """Before it installs anything; a device that it takes gets as far as the interpreter."""
    environment = {"COMPLETEDP_VENV": str(tmp_path / "venv"), "PYTHON": "no-such-python"}
    done = run_script("quickstart.sh", COMPLETEDP_DEVICE=device, **environment)
    assert (done.returncode, said in done.stderr) == (2, True)
    assert not (tmp_path / "venv").exists()
