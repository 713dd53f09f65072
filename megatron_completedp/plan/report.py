"""A ranking of layouts as text and as data."""

from __future__ import annotations

from dataclasses import asdict
from textwrap import fill, wrap
from typing import Any

from megatron_completedp.config.run import RunConfig
from megatron_completedp.core.budget import model_flops_per_token
from megatron_completedp.core.render import text_table
from megatron_completedp.plan.cost import LINK_EFFICIENCY
from megatron_completedp.plan.layouts import USABLE_MEMORY, Layout, Ranking
from megatron_completedp.plan.words import describe, reason

#: Rows of the printed table; --json has them all.
ROWS = 8

#: Columns of the text.
WIDTH = 120

_HEADER = ["TP", "PP", "VPP", "SP", "DP", "micro", "recompute"]
_HEADER += ["weights", "optim", "activ", "working", "GB"]
_HEADER += ["bubble", "sent GB", "step s", "MFU", "GPU-h"]


def ranking_text(ranking: Ranking) -> str:
    """The table of the best layouts, the recommendation and its reason, in at most WIDTH columns.

    The last lines are the layout's flags, as a shell takes them.
    """
    device, best = ranking.device, ranking.best
    head = (
        f"{ranking.gpus} x {device.name} ({device.memory_bytes / 1e9:.1f} GB each, "
        f"{best.limit_bytes / 1e9:.1f} GB of it for tensors; {device.bf16_flops / 1e12:.0f} "
        f"TFLOP/s bf16, utilization {ranking.utilization:g})"
    )
    table = text_table(
        _HEADER, [_row(ranking, layout) for layout in ranking.fitting[:ROWS]], left=0
    )
    counts = (
        f"{len(ranking.fitting)} layouts fit, {len(ranking.too_large)} need more memory. GB are of "
        "the fullest rank, sent GB of one rank and step."
    )
    hours = ranking.steps * best.cost.step_s / 3600
    return "\n".join(
        [
            fill(head, WIDTH),
            table,
            fill(counts, WIDTH),
            f"recommended: {describe(best)}",
            fill(f"because: {reason(ranking)}", WIDTH, subsequent_indent="  "),
            f"expected: {ranking.steps:,} steps of {best.cost.step_s:.3g} s, {hours:.3g} h, "
            f"{ranking.gpu_hours(best):,.4g} GPU-hours",
            "flags:\n" + " \\\n".join(wrap(best.flags, WIDTH - 2, break_on_hyphens=False)),
        ]
    )


def explanation(ranking: Ranking, config: RunConfig) -> str:
    """Where each number of the recommended layout comes from, with the values put in."""
    best = ranking.best
    memory, cost, work, parallel = best.memory, best.cost, best.workload, best.parallel
    device, shape = ranking.device, config.model
    elements = memory.parameters / 2
    shards = work.data_parallel_size if parallel.use_distributed_optimizer else 1
    flops = config.batch_tokens * model_flops_per_token(shape)
    more = cost.compute_s / (cost.compute_s - cost.recompute_s)
    again = f" x {more:.4g} (the layers' forward pass again)" if cost.recompute_s else ""
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    pp = parallel.pipeline_model_parallel_size
    rows = [
        ["parameters", f"{elements:,.0f} on this rank x 2 bytes", _gb(memory.parameters)],
        ["gradients", "x 4 bytes, fp32", _gb(memory.gradients)],
        ["masters", f"x 4 bytes / {shards} ranks", _gb(memory.masters)],
        ["moments", f"x 8 bytes / {shards} ranks", _gb(memory.moments)],
        ["activations", "kept for the backward pass (plan/memory.py)", _gb(memory.activations)],
        ["working", "the loss in fp32, or one layer going back", _gb(memory.working)],
        ["total", f"stage {memory.stage}, the fullest", _gb(memory.total)],
        [
            "usable",
            f"{device.memory_bytes / 1e9:.4g} GB x {USABLE_MEMORY:g}",
            _gb(best.limit_bytes),
        ],
        [
            "compute",
            f"{flops:.4g} FLOPs{again} / ({ranking.gpus} x {device.bf16_flops:.4g} x "
            f"{ranking.utilization:g})",
            _s(cost.compute_s),
        ],
        [
            "bubble",
            f"compute x (PP {pp} - 1) / ({work.micro_batches} micro batches x VPP {chunks})",
            _s(cost.bubble_s),
        ],
        ["tensor", _sent(cost.traffic.tensor), _s(cost.tensor_s)],
        ["pipeline", _sent(cost.traffic.pipeline), _s(cost.pipeline_s)],
        ["data", _sent(cost.traffic.data) + ", less what overlap hides", _s(cost.data_s)],
        ["update", f"fp32 state at {device.memory_bandwidth / 1e12:g} TB/s", _s(cost.update_s)],
        ["step", "the sum", _s(cost.step_s)],
        [
            "MFU",
            f"{flops:.4g} FLOPs at peak / step",
            f"{cost.model_flops_utilization:.3f}",
        ],
        [
            "GPU-hours",
            f"{ranking.steps:,} steps x step x {ranking.gpus} GPUs / 3600",
            f"{ranking.gpu_hours(best):,.4g}",
        ],
    ]
    return "the recommended layout, number by number\n" + text_table(
        ["part", "from", "value"], rows, left=2
    )


def ranking_json(ranking: Ranking) -> dict[str, Any]:
    """The ranking as plain data: bytes and seconds."""
    return {
        "gpu": asdict(ranking.device),
        "gpus": ranking.gpus,
        "utilization": ranking.utilization,
        "usable_bytes": ranking.best.limit_bytes,
        "reason": reason(ranking),
        "too_large": len(ranking.too_large),
        "layouts": [_layout_json(ranking, layout) for layout in ranking.fitting],
    }


def _layout_json(ranking: Ranking, layout: Layout) -> dict[str, Any]:
    cost = layout.cost
    return {
        "parallel": asdict(layout.parallel),
        **asdict(layout.workload),
        "memory_bytes": {**asdict(layout.memory), "total": layout.memory.total},
        "cost": {
            **asdict(cost),
            "step_s": cost.step_s,
            "model_flops_utilization": cost.model_flops_utilization,
        },
        "gpu_hours": ranking.gpu_hours(layout),
        "flags": layout.flags,
    }


def _row(ranking: Ranking, layout: Layout) -> list[str]:
    parallel, memory, cost = layout.parallel, layout.memory, layout.cost
    sent = cost.traffic.tensor + cost.traffic.pipeline + cost.traffic.data
    return [
        str(parallel.tensor_model_parallel_size),
        str(parallel.pipeline_model_parallel_size),
        str(parallel.virtual_pipeline_model_parallel_size or "-"),
        "yes" if parallel.sequence_parallel else "-",
        str(layout.workload.data_parallel_size),
        str(layout.workload.micro_batch_size),
        "full" if parallel.recompute_granularity == "full" else "-",
        f"{(memory.parameters + memory.gradients) / 1e9:.1f}",
        f"{(memory.masters + memory.moments) / 1e9:.1f}",
        f"{memory.activations / 1e9:.1f}",
        f"{memory.working / 1e9:.1f}",
        f"{memory.total / 1e9:.1f}",
        f"{cost.bubble_fraction:.1%}",
        f"{sent / 1e9:.1f}",
        f"{cost.step_s:.3g}",
        f"{cost.model_flops_utilization:.1%}",
        f"{ranking.gpu_hours(layout):,.4g}",
    ]


def _gb(number: float) -> str:
    return f"{number / 1e9:.3f} GB"


def _s(seconds: float) -> str:
    return f"{seconds:.4g} s"


def _sent(number: float) -> str:
    return f"{number / 1e9:.3g} GB at {LINK_EFFICIENCY:g} of the link's bandwidth"
