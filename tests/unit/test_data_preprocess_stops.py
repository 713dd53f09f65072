"""The preprocessing job stopped, killed and shared: the same bytes whatever interrupts it."""

from __future__ import annotations

import contextlib
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from preprocess_runs import (
    ROOT,
    SHARDS,
    arguments,
    finish,
    shard_hashes,
    start,
)

from megatron_completedp.data import preprocess as job
from megatron_completedp.data.claims import claim
from megatron_completedp.data.manifest import load_manifest
from tests.slurm.cluster import cluster


def kill_at_random(source: Path, reference: Path, tmp_path: Path, kills: int) -> None:
    """Kill -9 everything `kills` times at random points of an uninterrupted run, then finish.

    Every second time the workers outlive the command: they must not spoil what the next one does.
    """
    out, draw = tmp_path / "out", random.Random(kills)
    began = time.monotonic()
    finish(start(arguments(source, tmp_path / "timed", "--workers", "2")))
    duration = time.monotonic() - began
    cut_short = 0
    for number in range(kills):
        process = start(arguments(source, out, "--workers", "2"))
        time.sleep(draw.uniform(0, duration))
        cut_short += process.poll() is None
        with contextlib.suppress(ProcessLookupError):
            (os.kill if number % 2 else os.killpg)(process.pid, signal.SIGKILL)
        finish(process)
        if number % 5 == 4:  # else the later kills would find nothing left to do
            shutil.rmtree(out / "wikipedia", ignore_errors=True)
    assert cut_short >= kills // 2, "most kills came after the end and tested nothing"
    code, _, stderr = finish(start(arguments(source, out, "--workers", "2")))
    assert code == 0, stderr
    assert shard_hashes(out) == shard_hashes(reference)


def test_killed_three_times(source: Path, reference: Path, tmp_path: Path) -> None:
    kill_at_random(source, reference, tmp_path, 3)


@pytest.mark.slow
def test_killed_twenty_times(source: Path, reference: Path, tmp_path: Path) -> None:
    kill_at_random(source, reference, tmp_path, 20)


def test_finished_shards_are_not_touched_again(
    source: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(reference, tmp_path / "out"))
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*")}
    (out / "book" / "book.idx").write_bytes(b"cut")
    (out / "c4" / "c4-train.00001-of-00002.bin.tmp123").write_bytes(b"of a killed process")
    (out / "c4" / "c4-train.00001-of-00002.json").unlink()
    job.main(arguments(source, out, "--workers", "1"))
    assert shard_hashes(out) == shard_hashes(reference)
    redone = {path.stem for path in out.glob("*/*") if path.stat().st_mtime_ns != before[path]}
    assert redone == {"book", "c4-train.00001-of-00002"}
    total = capsys.readouterr().out.splitlines()[-1].split()
    assert total[:3] == ["total", "4", "2,740"]


def test_two_commands_at_once_share_the_shards_out(
    source: Path, reference: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    commands = [start(arguments(source, out, "--workers", "1")) for _ in range(2)]
    ended = [finish(command) for command in commands]
    assert [code for code, _, _ in ended] == [0, 0], ended
    made = [key for _, _, log in ended for key in re.findall(r"(\S+): made", log)]
    assert sorted(made) == sorted(SHARDS), "a shard was made twice, or by nobody"
    assert shard_hashes(out) == shard_hashes(reference)


def test_the_array_script(source: Path, reference: Path, tmp_path: Path) -> None:
    """Two tasks of launch/slurm_array.sbatch at once, with an srun that runs its command here."""
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text('#!/bin/sh\nshift\nexec "$@"\n')
    srun.chmod(0o755)
    out = tmp_path / "out"
    environment = {
        **os.environ,
        "PATH": f"{srun.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "COMPLETEDP_VENV": sys.prefix,
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "1",
        "SLURM_CPUS_PER_TASK": "1",
    }
    script = [str(ROOT / "launch" / "slurm_array.sbatch"), "preprocess", *arguments(source, out)]
    tasks = [
        subprocess.Popen(
            ["bash", *script], env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    logs = [task.communicate(timeout=300)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], logs
    assert all("workers: 1," in log for log in logs)
    assert shard_hashes(out) == shard_hashes(reference)


@pytest.mark.slurm
def test_a_slurm_array(source: Path, reference: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--wait", "--array=0-1", "--mem-per-cpu=100M", f"--output={tmp_path}/%a.log"]
    script = [str(ROOT / "launch" / "slurm_array.sbatch"), "preprocess"]
    with cluster(tmp_path / "slurm", nodes=2, cpus=1) as slurm:
        slurm.run(
            *["sbatch", *options, *script, *arguments(source, out)],
            cwd=ROOT,
            timeout_s=300,
            COMPLETEDP_VENV=sys.prefix,
            PYTHONPATH=str(ROOT),
        )
    assert shard_hashes(out) == shard_hashes(reference)


def test_a_full_disk(source: Path, reference: Path, tmp_path: Path) -> None:
    """A limit on file sizes stands for it: what was finished stays, the rest is told and undone."""
    out = Path(shutil.copytree(reference, tmp_path / "out"))
    for subset in ("c4", "wikipedia"):
        shutil.rmtree(out / subset)
    finished = {path: path.stat().st_mtime_ns for path in out.glob("book/*")}
    # preprocess.yaml, which is written first, fits; every other shard's .bin does not.
    limit = 16_384
    process = start(
        arguments(source, out, "--workers", "1"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    code, _, stderr = finish(process)
    assert code == 1
    assert re.search(r"wikipedia/wiki: .* cannot be written \(.*File too large", stderr), stderr
    assert "not begun" in stderr
    assert {path: path.stat().st_mtime_ns for path in out.glob("book/*")} == finished
    assert not [path for path in out.glob("*/*") if path not in finished]
    code, _, stderr = finish(start(arguments(source, out, "--workers", "2")))
    assert code == 0, stderr
    assert shard_hashes(out) == shard_hashes(reference)


@contextlib.contextmanager
def waiting_for_wikipedia(source: Path, out: Path) -> Iterator[subprocess.Popen[str]]:
    """A command that has made all shards but one, whose lock the test holds inside the block."""
    with claim(out / "wikipedia" / "wiki.lock", wait=False):
        process = start(arguments(source, out, "--workers", "1"))
        while not (out / "book" / "book.json").exists():  # the last that is free
            assert process.poll() is None, finish(process)
            time.sleep(0.05)
        time.sleep(0.5)  # for the worker to come to the lock
        yield process


def test_a_process_that_dies_costs_its_own_shard(
    source: Path, reference: Path, tmp_path: Path
) -> None:
    """The only worker is killed while it waits; another takes its place and the next shard."""
    out = tmp_path / "out"
    next_lock = contextlib.ExitStack()
    next_lock.enter_context(claim(out / "c4" / "c4-train.00000-of-00002.lock", wait=False))
    with next_lock, waiting_for_wikipedia(source, out) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        worker = max(map(int, children))  # the other is multiprocessing's resource tracker
        os.kill(worker, signal.SIGKILL)
        next_lock.close()
        code, _, stderr = finish(process)
    assert code == 1
    assert load_manifest(out / "c4" / "c4-train.00000-of-00002").documents == 900
    assert re.search(r"1 of 4 shards .*\n.*wikipedia/wiki: .*killed by SIGKILL", stderr), stderr
    assert finish(start(arguments(source, out, "--workers", "1")))[0] == 0
    assert shard_hashes(out) == shard_hashes(reference)


def test_ctrl_c(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with waiting_for_wikipedia(source, out) as process:
        os.killpg(process.pid, signal.SIGINT)
        code, _, stderr = finish(process, timeout_s=30)
    assert code == 130
    assert stderr.endswith("the same command goes on with what is missing\n"), stderr
    assert not list(out.glob("*/*.tmp*"))
