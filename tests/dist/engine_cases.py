"""Eight training steps under each layout; run by `harness`, compared in test_engine.py."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_completedp.config.parallel import ParallelConfig
from tests.mcore.engine_runs import STEPS, Trace, run_config, run_engine

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
SHARDED = {"use_distributed_optimizer": True}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}

#: Layouts by name. What a world size leaves over is data parallelism.
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "one_sharded": SHARDED,
    "tp2": TP2,
    "tp2_sp": {**TP2, "sequence_parallel": True},
    "pp2": PP2,
    "pp2_vpp2": {**PP2, "virtual_pipeline_model_parallel_size": 2},
    "dp2": {},
    "dp2_overlap": {"overlap_grad_reduce": True},
    "dp2_sharded": SHARDED,
    "dp2_sharded_overlap": {**SHARDED, **OVERLAP},
    "tp2_pp2": {**TP2, **PP2},
    "tp2_dp2_sharded": {**TP2, **SHARDED},
    "pp2_vpp2_dp2_sharded": {**PP2, "virtual_pipeline_model_parallel_size": 2, **SHARDED},
}


def __getattr__(name: str) -> Any:
    """Case `train_LAYOUT` trains; case `resume_LAYOUT` also stops and resumes half-way."""
    kind, _, layout = name.partition("_")
    if kind == "train":
        return lambda: _train(layout)
    if kind == "resume":
        return lambda: _resume(layout)
    raise AttributeError(name)


def _train(layout: str) -> Trace:
    return run_engine(run_config(ParallelConfig(**LAYOUTS[layout])))[0]


def _resume(layout: str) -> Trace:
    config = run_config(ParallelConfig(**LAYOUTS[layout]))
    shared = [tempfile.mkdtemp(dir=os.environ.get("TMPDIR"))]
    dist.broadcast_object_list(shared)
    folder = Path(shared[0])
    first, _ = run_engine(config, stop_at=STEPS // 2, save_to=folder)
    second, _ = run_engine(config, resume_from=folder / f"step_{STEPS // 2:08d}")
    return Trace(
        first.losses + second.losses, first.grad_norms + second.grad_norms, second.evaluation
    )
