"""Preprocessing by launch/slurm_array.sbatch on a real controller, stopped on the way."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_completedp.data import preprocess
from megatron_completedp.data.claims import claim
from megatron_completedp.data.quick import QuickSettings, quick
from tests.slurm.cluster import Cluster, cluster, wait_until

ROOT = Path(__file__).parents[2]
TASKS = 2
#: Of minutes on an idle machine.
TIMEOUT_S = 900


def hashes(out: Path) -> dict[str, str]:
    """SHA-256 of every token file, by its path in `out`."""
    files = [path for path in out.glob("*/*") if path.suffix in (".bin", ".idx")]
    return {
        f"{path.relative_to(out)}": hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def begun(logs: Sequence[Path]) -> list[int]:
    """How often each task has begun to work."""
    texts = [log.read_text() if log.exists() else "" for log in logs]
    return [text.count("workers: 1,") for text in texts]


def restarts(slurm: Cluster, task: str) -> int:
    """How often a task was queued again."""
    shown = slurm.run("scontrol", "show", "job", "--oneliner", task)
    return int(re.findall(r" Restarts=(\d+) ", shown)[0])


@pytest.mark.slow
@pytest.mark.slurm
def test_an_array_finishes_though_its_tasks_are_preempted_and_out_of_time(tmp_path: Path) -> None:
    quick(tmp_path / "text", QuickSettings(max_mb=0.3, valid_mb=0.03, vocab_size=512))
    given = ["--sources", f"{tmp_path}/text/jsonl/train"]
    given += ["--tokenizer", f"{tmp_path}/text/tokenizer.model"]
    preprocess.main([*given, "--out", f"{tmp_path}/reference", "--workers", "1"])
    expected, out = hashes(tmp_path / "reference"), tmp_path / "out"
    assert len(expected) == 4, "two shards are to be shared out"
    with cluster(tmp_path / "slurm", nodes=2, cpus=1) as slurm:
        # Held by the test, so that both tasks are at work when they are stopped.
        with claim(out / "c4" / "c4-train.00000-of-00001.lock", wait=False):
            job = slurm.run(
                "sbatch", "--parsable", f"--array=0-{TASKS - 1}", "--mem-per-cpu=100M",
                f"--output={tmp_path}/%a.log", "launch/slurm_array.sbatch", "preprocess",
                *given, "--out", str(out),
                cwd=ROOT,
                COMPLETEDP_VENV=sys.prefix,
                PYTHONPATH=str(ROOT),
            )  # fmt: skip
            logs = [tmp_path / f"{task}.log" for task in range(TASKS)]
            tasks = [f"{job}_{task}" for task in range(TASKS)]
            wait_until("both tasks are at work", lambda: begun(logs) == [1, 1], timeout_s=TIMEOUT_S)
            wait_until("the free shard is made", lambda: any(out.glob("github/*.json")))
            # As a preemption does; and as a time limit does, after which SLURM requeues nothing.
            slurm.run("scontrol", "requeue", tasks[0])
            slurm.bring_time_limit_near(tasks[1])
            wait_until(
                "both tasks are queued again",
                lambda: [restarts(slurm, task) for task in tasks] == [1, 1],
                timeout_s=TIMEOUT_S,
            )
            slurm.run("scontrol", "update", f"JobId={tasks[1]}", "TimeLimit=UNLIMITED")
            wait_until("both tasks are back", lambda: begun(logs) == [2, 2], timeout_s=TIMEOUT_S)
        wait_until("the end of the array", lambda: not slurm.jobs(), timeout_s=TIMEOUT_S)
    text = "".join(f"== {log}\n{log.read_text()}" for log in logs)
    assert hashes(out) == expected, text
    # Finished shards were found, not made again.
    assert sorted(re.findall(r"(\S+)/\S+: made", text)) == ["c4", "github"], text
    assert "found finished" in text
