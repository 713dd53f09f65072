"""The scripts of examples/engines, as a user starts them: any sharding trains like one process.

Slow: each is several starts of torch and transformers; what they call has fast tests of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")
pytest.importorskip("transformers")

from tests.mcore.train_runs import ROOT, make_corpus, write_run

pytestmark = pytest.mark.slow

STEPS = 6


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    return write_run(folder / "run", make_corpus(folder))


def losses(config: Path, script: str, *flags: str, ranks: int, **environment: str) -> list[float]:
    """Of the steps, and after them of the validation text, as the script prints them."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, "-m", *launcher, f"examples/engines/{script}"]
    done = subprocess.run(
        [*command, "--config", str(config), "--stop-at", str(STEPS), *flags],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = [float(number) for number in re.findall(r"loss (\d+\.\d+)", done.stdout)]
    assert len(found) == STEPS + 1
    return found


def test_fsdp2_on_two_processes_trains_like_one(config: Path) -> None:
    one = losses(config, "fsdp2.py", ranks=1)
    assert one[0] - one[STEPS - 1] > 0.2  # it learns
    assert losses(config, "fsdp2.py", ranks=2) == pytest.approx(one, abs=2e-5)


@pytest.mark.parametrize("stage", ["1", "3"])
def test_zero_on_two_processes_trains_like_fsdp2_on_one(
    stage: str, config: Path, tmp_path: Path
) -> None:
    """DeepSpeed compiles its communication at first, in a folder of this test's own."""
    pytest.importorskip("deepspeed", reason="pip install -e '.[deepspeed]'")
    environment = {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    zero = losses(config, "zero.py", "--stage", stage, ranks=2, **environment)
    assert zero == pytest.approx(losses(config, "fsdp2.py", ranks=1), abs=2e-5)
