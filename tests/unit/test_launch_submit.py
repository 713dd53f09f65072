"""What is checked before a job is queued, and the sbatch command it becomes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from launch_samples import ROOT, fake, launch, write_config
from test_train_arguments import GUARDED

from megatron_completedp.config.load import load_config
from megatron_completedp.config.run import RunConfig
from megatron_completedp.launch.attempts import Attempts
from megatron_completedp.launch.command import is_kept, read_command


def command_of(output: str) -> list[str]:
    """The words of the printed command."""
    return typed(output).split()


def typed(output: str) -> str:
    """The printed command as one would type it."""
    (line,) = [line for line in output.splitlines() if line.startswith("command")]
    return line.removeprefix("command").strip()


def test_the_command_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path)
    cluster = tmp_path / "cluster.yaml"
    settings = {"nodes": 8, "partition": "gpu", "account": "a1", "time_limit_hours": 0.26}
    settings |= {"stop_lead_s": 300, "gpus_per_task": 1}
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
        *["mkdir", "-p", f"{run_dir}/launch", "&&"],
        f"COMPLETEDP_ROOT={ROOT}",
        f"COMPLETEDP_VENV={sys.prefix}",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300",
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
        "--signal=TERM@300",
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


#: Notes how it was called, and fails where the folder of the log is not there, as a job does.
SBATCH = """\
for each in "$@"; do case $each in --output=*) touch "${each#*=}" || exit 1;; esac; done
echo "$COMPLETEDP_TRIES $*" >>%s/called; echo "42;cluster"
"""


def test_submitting_makes_the_log_s_folder_and_passes_the_environment_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(tmp_path / "bin", monkeypatch, sbatch=SBATCH % tmp_path, squeue="true")
    config = str(write_config(tmp_path))
    assert launch(monkeypatch, "train", "--config", config, "--tries", "5") == 0
    assert "job      42; follow it with" in capsys.readouterr().out
    assert (tmp_path / "called").read_text().startswith("5 --parsable --job-name=run")


def test_the_command_of_a_dry_run_works_typed_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(tmp_path / "bin", monkeypatch, sbatch=SBATCH % tmp_path, squeue="true")
    config, flags = str(write_config(tmp_path)), ["--run-dir", f"{tmp_path}/a run"]
    assert launch(monkeypatch, "train", "--config", config, "--dry-run", "--", *flags) == 0
    done = subprocess.run(
        typed(capsys.readouterr().out), shell=True, capture_output=True, text=True
    )
    assert done.stdout == "42;cluster\n", done.stderr
    assert f"slurm.sbatch --config {config} --run-dir" in (tmp_path / "called").read_text()


def test_a_queued_job_trains_what_was_submitted_whatever_becomes_of_the_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(tmp_path / "bin", monkeypatch, sbatch=SBATCH % tmp_path, squeue="true")
    config = write_config(tmp_path)
    flags = ["--", "--lr", "0.03", "--allow-hp-change", "q.lr", "--allow-hp-change", "*.eps"]
    assert launch(monkeypatch, "train", "--config", str(config), *flags) == 0
    submitted = replace_lr(load_config(config), 0.03)
    config.write_text(config.read_text().replace(f"{tmp_path}/run", f"{tmp_path}/other"))
    words = (tmp_path / "called").read_text().split()
    arguments = words[words.index("--config") :]
    assert arguments[2:] == ["--allow-hp-change", "q.lr", "--allow-hp-change", "*.eps"]
    kept, own = read_command(arguments)
    assert kept == submitted
    assert own.allow_hp_change == ("q.lr", "*.eps")
    assert is_kept(kept, arguments)
    assert not is_kept(submitted, ["--config", str(config)])
    # Another submission of the run has another copy, and does not touch the one that may be in use.
    config.write_text(config.read_text().replace(f"{tmp_path}/other", f"{tmp_path}/run"))
    assert launch(monkeypatch, "train", "--config", str(config)) == 0
    assert read_command(arguments)[0] == submitted
    assert len(list((tmp_path / "run" / "launch").glob("run-*.yaml"))) == 2


def replace_lr(config: RunConfig, lr: float) -> RunConfig:
    return replace(config, hyperparams=replace(config.hyperparams, lr=lr))


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


def test_a_job_that_was_queued_by_hand_is_known_by_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has no comment; its start is in the run's folder."""
    Attempts(tmp_path / "run").begin("9", ["n1"])
    squeue = "echo '9|RUNNING|n1|(null)'; echo '91|RUNNING|n2|(null)'"
    fake(tmp_path / "bin", monkeypatch, sbatch=f"touch {tmp_path}/called", squeue=squeue)
    assert launch(monkeypatch, "train", "--config", str(write_config(tmp_path))) == 1
    assert f"job 9 of {tmp_path}/run is RUNNING n1" in capsys.readouterr().err
    assert not (tmp_path / "called").exists()


def test_arrays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(yaml.safe_dump({"nodes": 8, "tries": 2, "partition": "high"}))
    flags = ["--tasks", "32", "--cpus-per-process", "2", "--partition", "low", "--dry-run"]
    flags += ["--gpus-per-task", "1", "--cluster", str(cluster)]
    own = ["search", "--config", "s.yaml"]
    assert launch(monkeypatch, "array", *flags, "--", *own) == 0
    words = command_of(capsys.readouterr().out)[3:]
    assert words == [
        "sbatch",
        "--parsable",
        "--job-name=search",
        "--array=0-31",
        "--cpus-per-task=2",
        "--gpus-per-node=1",
        "--partition=low",
        "--signal=TERM@120",
        f"{ROOT}/launch/slurm_array.sbatch",
        *own,
    ]


def test_nothing_here_needs_torch(tmp_path: Path) -> None:
    guarded = GUARDED.replace("megatron_completedp.train", "megatron_completedp.launch")
    command = [sys.executable, "-c", guarded, "train", "--config", str(write_config(tmp_path))]
    done = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "sbatch --parsable" in done.stdout
