"""examples/pipeline as a whole: five stages, each after the one before."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")
pytest.importorskip("optuna")
pytest.importorskip("safetensors")

from tests.mcore.train_runs import ROOT, losses
from tests.slurm.cluster import cluster, wait_until

#: Minutes on an idle machine.
TIMEOUT_S = 3000


@pytest.mark.slow
@pytest.mark.slurm
def test_the_chain_from_text_to_an_exported_model(tmp_path: Path) -> None:
    # A checkout of its own: the example writes into its runs/.
    for name in ("examples/pipeline", "launch"):
        shutil.copytree(ROOT / name, tmp_path / name)
    runs = tmp_path / "runs" / "pipeline"
    with cluster(tmp_path / "slurm", nodes=2, cpus=2) as slurm:
        output = slurm.run(
            "examples/pipeline/submit.sh",
            cwd=tmp_path,
            timeout_s=600,
            COMPLETEDP_VENV=sys.prefix,
            PYTHONPATH=str(ROOT),
        )
        assert len(output.splitlines()) >= 6, output
        wait_until("the chain has ended", lambda: not slurm.jobs(), timeout_s=TIMEOUT_S)
    logs = "".join(f"== {path}\n{path.read_text()}" for path in sorted(runs.glob("logs/*.log")))
    assert (runs / "hf" / "model.safetensors").exists(), logs
    assert (runs / "ladder" / "report.json").exists(), logs
    final = losses(runs / "target", "eval")[-1]
    assert final[0] == 200, logs
    # A loss near that of a uniform guess, log(1024) = 6.93, would mean that nothing was learnt.
    assert final[1] < 5.5
    config = (runs / "target" / "config.yaml").read_text()
    assert "recipe" in config
