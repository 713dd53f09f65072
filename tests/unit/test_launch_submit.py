"""What is checked before a job is queued, and the sbatch command it becomes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from launch_samples import write_config
from test_train_arguments import GUARDED

from megatron_completedp.config.cli import run_command
from megatron_completedp.launch.__main__ import main

ROOT = Path(__file__).parents[2]
SMALL = ("training.precision", "bf16")
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


def fake(folder: Path, monkeypatch: pytest.MonkeyPatch, **programs: str) -> Path:
    """Programs of these names, by their shell text, before anything else on PATH; their folder."""
    folder.mkdir(exist_ok=True)
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def launch(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["launch", *arguments])
    return run_command(main)


def command_of(output: str) -> list[str]:
    """The words of the printed command."""
    (line,) = [line for line in output.splitlines() if line.startswith("command")]
    return line.split()[1:]


def test_the_command_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path)
    cluster = tmp_path / "cluster.yaml"
    settings = {"nodes": 8, "partition": "gpu", "account": "a1", "time_limit_hours": 0.26}
    cluster.write_text(yaml.safe_dump({**settings, "sbatch": ["qos=high", "--exclusive"]}))
    flags = ["--nodes", "2", "--processes-per-node", "4", "--cpus-per-process", "3", "--dry-run"]
    rest = ["--", "--tensor-model-parallel-size", "2", "--training.device", "cuda"]
    files = ["--config", str(config), "--cluster", str(cluster)]
    assert launch(monkeypatch, "train", *files, *flags, *rest) == 0
    output = capsys.readouterr().out
    assert "2 nodes x 4 processes = 8 ranks: TP 2, PP 1, DP 4; 2 micro batches of 1" in output
    assert "100 steps of 128 tokens" in output
    run_dir = tmp_path / "run"
    assert command_of(output) == [
        f"COMPLETEDP_ROOT={ROOT}",
        f"COMPLETEDP_VENV={sys.prefix}",
        "COMPLETEDP_PROCESSES=4",
        "COMPLETEDP_TRIES=3",
        "sbatch",
        "--parsable",
        "--job-name=run",
        f"--comment={run_dir}",
        f"--output={run_dir}/launch/job-%j.log",
        "--nodes=2",
        "--cpus-per-task=12",
        "--gpus-per-node=4",
        "--partition=gpu",
        "--account=a1",
        "--time=16",
        "--qos=high",
        "--exclusive",
        f"{ROOT}/launch/slurm.sbatch",
        "--config",
        str(config),
        *rest[1:],
    ]
    assert not run_dir.exists()


def test_a_run_on_cpu_asks_for_no_gpus_and_a_container_brings_its_own_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(write_config(tmp_path))
    image = ["--container", "image.sqsh", "--container-mounts", "/data:/data", "/a:/b"]
    assert launch(monkeypatch, "train", "--config", config, *image, "--dry-run") == 0
    words = command_of(capsys.readouterr().out)
    assert not [word for word in words if "gpus" in word or "VENV" in word]
    assert "COMPLETEDP_CONTAINER=image.sqsh" in words
    assert "COMPLETEDP_CONTAINER_MOUNTS=/data:/data,/a:/b" in words


def test_submitting_makes_the_log_s_folder_and_passes_the_environment_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(
        tmp_path / "bin",
        monkeypatch,
        sbatch=f'echo "$COMPLETEDP_TRIES $*" >{tmp_path}/called; echo "42;cluster"',
        squeue="true",
    )
    config = str(write_config(tmp_path))
    assert launch(monkeypatch, "train", "--config", config, "--tries", "5") == 0
    assert "job      42; follow it with" in capsys.readouterr().out
    assert (tmp_path / "called").read_text().startswith("5 --parsable --job-name=run")
    assert (tmp_path / "run" / "launch").is_dir()


def test_a_second_job_of_the_same_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, comment = str(write_config(tmp_path)), tmp_path / "run"
    other = "9|RUNNING|n1|/another/run"
    sbatch = f"touch {tmp_path}/called; echo 43"
    squeue = f"echo '{other}'; echo '12|PENDING|(Priority)|{comment}'"
    fake(tmp_path / "bin", monkeypatch, sbatch=sbatch, squeue=squeue)
    assert launch(monkeypatch, "train", "--config", config) == 1
    message = capsys.readouterr().err
    assert f"job 12 of {comment} is PENDING (Priority)" in message
    assert "scancel 12 first" in message
    assert not (tmp_path / "called").exists()
    # Negative control: the other run's job alone is no hindrance.
    fake(tmp_path / "bin", monkeypatch, squeue=f"echo '{other}'")
    assert launch(monkeypatch, "train", "--config", config) == 0


def test_arrays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--tasks", "32", "--cpus-per-process", "2", "--partition", "low", "--dry-run"]
    own = ["search", "--config", "s.yaml"]
    assert launch(monkeypatch, "array", *flags, "--", *own) == 0
    words = command_of(capsys.readouterr().out)[2:]
    assert words == [
        "sbatch",
        "--parsable",
        "--job-name=search",
        "--array=0-31",
        "--cpus-per-task=2",
        "--partition=low",
        f"{ROOT}/launch/slurm_array.sbatch",
        *own,
    ]


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
        "tp", "batch", "nodes", "time", "mounts", "empty", "gpu", "fp32", "no_layout", "layout"
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


def test_nothing_here_needs_torch(tmp_path: Path) -> None:
    guarded = GUARDED.replace("megatron_completedp.train", "megatron_completedp.launch")
    command = [sys.executable, "-c", guarded, "train", "--config", str(write_config(tmp_path))]
    done = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "sbatch --parsable" in done.stdout
