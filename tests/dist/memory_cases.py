"""Peak bytes of short training runs, measured and predicted; run by `harness`.

Measured is every byte that torch's CPU allocator hands out and takes back while the engine is built
and takes two steps (the second one has moments), as torch's profiler records it: tensors alone, no
resident-set noise. What gloo allocates for itself is not torch's and not counted.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_completedp.config.parallel import ParallelConfig
from megatron_completedp.config.run import RunConfig
from megatron_completedp.config.sections import TrainingConfig
from megatron_completedp.core.hyperparams import BaseHyperparams
from megatron_completedp.core.shape import ModelShape
from megatron_completedp.mcore.engine import Engine
from megatron_completedp.mcore.parallel import destroy_parallel, initialize_parallel
from megatron_completedp.mcore.platform import CpuPlatform
from megatron_completedp.plan.memory import Workload, stage_memory
from megatron_completedp.plan.run_plan import Plan

SHARDED = {"use_distributed_optimizer": True}
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}

WIDE = {"hidden_size": 256, "ffn_hidden_size": 704, "num_attention_heads": 4, "head_dim": 64}
DEEP = {"hidden_size": 128, "ffn_hidden_size": 352, "num_attention_heads": 4, "head_dim": 32}
#: Activations, the loss, or weights and moments dominate.
SHAPES: dict[str, dict[str, Any]] = {
    "layers": {**DEEP, "num_layers": 8, "vocab_size": 512},
    "vocabulary": {**DEEP, "num_layers": 2, "vocab_size": 8192},
    "weights": {**WIDE, "num_layers": 4, "vocab_size": 2048, "seq_length": 32},
    "gelu": {**DEEP, "num_layers": 4, "vocab_size": 1024, "activation": "gelu"},
    "grouped": {**DEEP, "num_layers": 4, "vocab_size": 1024, "num_query_groups": 2},
}
#: (shape, precision, layout); the case's name joins its parts.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{f"{name}_fp32": (name, "fp32", {}) for name in SHAPES},
    **{f"{name}_bf16": (name, "bf16", {}) for name in SHAPES},
    "layers_recompute": ("layers", "fp32", {"recompute_granularity": "full"}),
    "weights_dp2": ("weights", "bf16", {}),
    "weights_dp2_sharded": ("weights", "bf16", SHARDED),
    "layers_tp2": ("layers", "fp32", TP2),
    "vocabulary_tp2_sp": ("vocabulary", "bf16", {**TP2, "sequence_parallel": True}),
    "layers_tp2_sp": ("layers", "fp32", {**TP2, "sequence_parallel": True}),
    "layers_pp2": ("layers", "fp32", PP2),
    "layers_pp2_vpp2": ("layers", "fp32", {**PP2, "virtual_pipeline_model_parallel_size": 2}),
    "vocabulary_pp2": ("vocabulary", "bf16", PP2),
    "layers_pp2_recompute": ("layers", "bf16", {**PP2, "recompute_granularity": "full"}),
}

MICRO_BATCHES = 4


def __getattr__(name: str) -> Any:
    """A case is a name in `CASES`."""
    if name not in CASES:
        raise AttributeError(name)
    return lambda: measure(*CASES[name])


def measure(shape: str, precision: str, layout: dict[str, Any]) -> dict[str, float]:
    """This rank's peak in bytes: `measured` by the profiler and `predicted` by the plan."""
    parallel = ParallelConfig(**layout)
    config = RunConfig(
        run_dir="unused",
        hyperparams=BaseHyperparams(lr=1e-3),
        model=ModelShape(**{"seq_length": 128, **SHAPES[shape]}),
        parallel=parallel,
        training=TrainingConfig(
            global_batch_size=16,
            micro_batch_size=2,
            train_steps=2,
            device="cpu",
            precision=precision,
        ),
    )
    # What an earlier case left to the collector must not be freed while this one is measured.
    gc.collect()
    platform = CpuPlatform()
    state = initialize_parallel(platform, parallel, timeout_s=120, seed=0)
    try:
        ids = torch.randint(config.model.vocab_size, (2, config.model.seq_length + 1))
        batch = {"tokens": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            engine = Engine(config, Plan.of(config).resolved, platform)
            for _ in range(2):
                engine.train_step([batch] * MICRO_BATCHES)
        workload = Workload(
            data_parallel_size=state.dp_size,
            micro_batch_size=2,
            micro_batches=MICRO_BATCHES,
            precision=precision,
        )
        memory = stage_memory(config.model, parallel, workload, state.pp_rank, kernels="cpu")
        parts = {k: v for k, v in vars(memory).items() if k != "stage"}
        return {"measured": peak_bytes(profiler), "predicted": memory.total, **parts}
    finally:
        destroy_parallel(keep_process_group=True)


def peak_bytes(profiler: profile) -> float:
    """The most bytes that were allocated at once while `profiler` looked on."""
    events = [
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    held = peak = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        held += size
        peak = max(peak, held)
    return float(peak)
