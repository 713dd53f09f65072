"""SIGKILL at random moments of training and saving loses no checkpoint and changes no number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core")

from tests.mcore.train_runs import ROOT, losses, make_corpus, write_run

#: Steps between checkpoints; a save takes several times as long as a step.
INTERVAL = 2


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize(
    ("asynchronous", "kills"),
    [
        pytest.param(False, 3, id="few"),
        pytest.param(False, 30, id="many", marks=pytest.mark.slow),
        pytest.param(True, 15, id="background", marks=pytest.mark.slow),
    ],
)
def test_killed_runs_end_as_if_undisturbed(
    asynchronous: bool, kills: int, corpus: Path, tmp_path: Path
) -> None:
    configs = [
        write_run(
            tmp_path / name,
            corpus,
            parallel={"use_distributed_optimizer": True},
            # A life lasts for at most three saves and a step; the last one must be left some.
            training__train_steps=3 * INTERVAL * (kills + 1),
            evaluation__interval=3 * INTERVAL * (kills + 1),
            checkpoint={"interval": INTERVAL, "keep_last": 2, "asynchronous": asynchronous},
        )
        for name in ("undisturbed", "killed")
    ]
    report = kill_runs(configs, kills=kills, seed=kills)
    log = configs[1].with_suffix(".log")
    assert report["codes"] == [0, 0, 0, 0], log.read_text()[-4000:]
    for kill in report["kills"]:
        # A row of step r is written before its own save and after all earlier ones; in the
        # background one of those may still have been under way.
        reached = (kill["reported"] - 1) // INTERVAL * INTERVAL
        assert kill["after"] >= max(kill["before"], reached - asynchronous * INTERVAL), kill
        assert kill["same_hyperparams"], kill
        assert kill["kept"] <= 3, kill  # between the rename and the deletion there is one more
    assert losses(tmp_path / "killed") == losses(tmp_path / "undisturbed")
    assert losses(tmp_path / "killed", "eval") == losses(tmp_path / "undisturbed", "eval")
    assert report["equal_shards"]
    in_a_save = sum(kill["saving"] for kill in report["kills"])
    print(f"{kills} kills, {in_a_save} of them in a save, {report['seconds']} s")
    # Kills that prove nothing would pass as well.
    assert any(kill["after"] > kill["before"] for kill in report["kills"])
    if kills >= 15:
        assert in_a_save >= kills // 5


def kill_runs(configs: list[Path], *, kills: int, seed: int) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.dist.kill_runs", *map(str, configs)]
    command += ["--kills", str(kills), "--seed", str(seed)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60 + 30 * kills,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report
