"""A small preprocessing job, started as a user starts it, and what its folder holds."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_samples import TEXTS, small_tokenizer, write_jsonl

ROOT = Path(__file__).parents[2]
#: Shards of the job, with the number of documents in each.
SHARDS = {
    "book/book": 40,
    "c4/c4-train.00000-of-00002": 900,
    "c4/c4-train.00001-of-00002": 300,
    "wikipedia/wiki": 1500,
}


def texts_of(key: str) -> list[str]:
    """The documents of one shard: different in every one, with text that is not ASCII."""
    return [f"{key} {i} caf\u00e9\n{TEXTS[i % 3]}" for i in range(SHARDS[key])]


def write_sources(folder: Path) -> Path:
    """FOLDER/corpus in RedPajama-1T's layout; FOLDER/tokenizer.model."""
    for key in SHARDS:
        path = folder / "corpus" / f"{key}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(path, texts_of(key))
    small_tokenizer(folder)
    return folder


def arguments(folder: Path, out: Path, *flags: str) -> list[str]:
    """The command's arguments for the job on `write_sources(folder)`."""
    model = folder / "tokenizer.model"
    return [
        "--sources",
        f"{folder / 'corpus'}",
        "--tokenizer",
        f"{model}",
        "--out",
        f"{out}",
        *flags,
    ]


def start(arguments: list[str], **options: Any) -> subprocess.Popen[str]:
    """The command as a process that leads a group of its own; its output is piped."""
    environment: Mapping[str, str] = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "preprocess_redpajama.py"), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def finish(process: subprocess.Popen[str], *, timeout_s: float = 300) -> tuple[int, str, str]:
    """Wait for `process`: its exit code, stdout and stderr. Kills it at the timeout."""
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # workers hold its pipes, too
        process.communicate()
        raise
    return process.returncode, stdout, stderr


def shard_hashes(out: Path) -> dict[str, str]:
    """sha256 of every file below the subset folders of `out`, by relative path."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.glob("*/**/*"))
        if path.is_file()
    }
