"""A corpus and a run small enough to train in a second, for tests of the training command."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from megatron_completedp.data.jsonl import read_whole_rows
from megatron_completedp.data.quick import QuickSettings, quick
from tests.tiny import TINY_MODEL

ROOT = Path(__file__).parents[2]
STEPS = 20
#: Steps between checkpoints.
INTERVAL = 4

_TREE: dict[str, Any] = {
    "hyperparams": {"lr": 0.01},
    "model": TINY_MODEL,
    "training": {
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "train_steps": STEPS,
        "device": "cpu",
    },
    "evaluation": {"interval": STEPS // 2, "samples": 8},
    "checkpoint": {"interval": INTERVAL, "keep_last": 2},
    "logging": {"interval": 1},
}


def make_corpus(folder: Path) -> Path:
    """tokenizer.model with 512 ids, and train and valid pairs of 150,000 and 15,000 tokens."""
    quick(folder, QuickSettings(max_mb=0.3, valid_mb=0.03, vocab_size=512))
    return folder


def make_heldout(corpus: Path) -> Path:
    """A pair of other text by the same tokenizer, at the prefix that is returned."""
    folder = corpus / "other"
    folder.mkdir()
    shutil.copy(corpus / "tokenizer.model", folder)
    quick(folder, QuickSettings(max_mb=0.15, valid_mb=0.05, vocab_size=512))
    return folder / "valid"


def write_run(run_dir: Path, corpus: Path, **changes: Any) -> Path:
    """The YAML of the tiny run, beside `run_dir`; `changes` are section__key or whole sections."""
    data = {
        "train": [str(corpus / "train")],
        "valid": [str(corpus / "valid")],
        "tokenizer": str(corpus / "tokenizer.model"),
    }
    tree = {"run_dir": str(run_dir), **copy.deepcopy(_TREE), "data": data}
    for path, value in changes.items():
        section, _, key = path.partition("__")
        if key:
            tree.setdefault(section, {})[key] = value
        else:
            tree[section] = value
    config = run_dir.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return config


def start(config: Path, *flags: str, ranks: int = 1) -> subprocess.Popen[str]:
    """The command as a user starts it, under torchrun for several ranks; output is piped."""
    launcher = []
    if ranks > 1:
        launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, "megatron_completedp.train", "--config", config, *flags],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], *, timeout_s: float = 120) -> tuple[int, str]:
    """Wait for `process`; its exit code and what it wrote to stderr. Kills it at the timeout."""
    try:
        _, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return process.returncode, stderr


def losses(run_dir: Path, kind: str = "train") -> list[tuple[int, float]]:
    """(step, loss) of every row of one kind in the run's metrics, in the file's order."""
    rows = read_whole_rows(run_dir / "metrics.jsonl")
    return [(row["step"], row["loss"]) for row in rows if row["kind"] == kind]
