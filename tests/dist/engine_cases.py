"""Training under each layout; run by `harness`, compared in test_engine.py."""

from __future__ import annotations

from typing import Any

from megatron_completedp.config.parallel import ParallelConfig
from tests.dist.reference_steps import follow
from tests.dist.resume_steps import resumed_and_whole
from tests.mcore.engine_runs import Trace, run_config, run_engine

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
    """Cases are named `KIND_LAYOUT`: `train` trains, `resume` trains with and without a restart,
    and `follow` holds every update of 100 steps to the reference.
    """
    kind, _, layout = name.partition("_")
    if kind == "train":
        return lambda: _train(layout)
    if kind == "resume":
        return lambda: resumed_and_whole(LAYOUTS[layout])
    if kind == "follow":
        return lambda: follow(LAYOUTS[layout])
    raise AttributeError(name)


def _train(layout: str) -> Trace:
    return run_engine(run_config(ParallelConfig(**LAYOUTS[layout])))[0]
