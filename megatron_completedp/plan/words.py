"""What `plan` says of layouts: one in short, why it is recommended, and why there is none."""

from __future__ import annotations

from megatron_completedp.config.run import RunConfig
from megatron_completedp.plan.devices import DEVICES, Device
from megatron_completedp.plan.layouts import (
    TIE,
    Layout,
    Ranking,
    complexity,
    every_layout,
    next_gpus_below,
)


def describe(layout: Layout) -> str:
    """A layout in one short phrase."""
    parallel, workload = layout.parallel, layout.workload
    chunks = parallel.virtual_pipeline_model_parallel_size
    parts = [
        f"TP {parallel.tensor_model_parallel_size}"
        + (" with SP" if parallel.sequence_parallel else ""),
        f"PP {parallel.pipeline_model_parallel_size}" + (f" x VPP {chunks}" if chunks else ""),
        f"DP {workload.data_parallel_size}",
        f"micro batch {workload.micro_batch_size}",
    ]
    if parallel.recompute_granularity == "full":
        parts.append("full recomputation")
    return ", ".join(parts)


def reason(ranking: Ranking) -> str:
    """Why the first layout is the first, in words."""
    best = ranking.best
    cost, parallel = best.cost, best.parallel
    spare = (best.limit_bytes - best.memory.total) / 1e9
    words = []
    losses = {
        "the pipeline's bubble": cost.bubble_s,
        "tensor-parallel traffic": cost.tensor_s,
        "pipeline traffic": cost.pipeline_s,
        "data-parallel traffic that overlap does not hide": cost.data_s,
        "the update": cost.update_s,
        "recomputation": cost.recompute_s,
    }
    worst = max(losses, key=losses.__getitem__)
    share = losses[worst] / cost.step_s
    words.append(
        f"largest loss: {worst}, {share:.1%} of the step"
        if share >= 0.001
        else "the step is matrix products alone, all else is below 0.1%"
    )
    plain = parallel.model_parallel_size == 1
    smaller = [layout for layout in ranking.too_large if complexity(layout) < complexity(best)]
    if plain and parallel.recompute_granularity == "none":
        words.insert(0, _why_nothing_is_split(best))
    elif smaller:
        nearest = smaller[0]
        over = (nearest.memory.total - nearest.limit_bytes) / 1e9
        words.insert(0, f"{describe(nearest)} would be simpler and is {over:.1f} GB too large")
    tie = any(layout.cost.step_s < cost.step_s for layout in ranking.fitting[1:])
    if tie:
        words.append(f"layouts up to {TIE - 1:.0%} faster exist and are less simple")
    return "; ".join(words) + f"; {spare:.1f} GB to spare."


def _why_nothing_is_split(layout: Layout) -> str:
    """For a layout without TP and PP; ZeRO-1 may be what makes it fit."""
    memory, replicas = layout.memory, layout.workload.data_parallel_size
    shards = replicas if layout.parallel.use_distributed_optimizer else 1
    alone = memory.total + (shards - 1) * (memory.masters + memory.moments)
    if alone <= layout.limit_bytes:
        return "a whole replica fits on one GPU, so nothing is split"
    return (
        f"with optimizer state sharded over {shards} ranks a GPU holds the model, so nothing else "
        "is split"
    )


def why_none_divides(config: RunConfig, gpus: int) -> str:
    """The message for a number of GPUs that no layout of this model and batch uses."""
    model, evaluation = config.model, config.evaluation
    sizes = [f"{model.num_layers} layers", f"{model.num_attention_heads} heads"]
    ways = ["another number of GPUs"]
    if evaluation.interval:
        sizes.append(f"evaluations of {evaluation.samples} sequences")
        ways.append("another evaluation.samples")
    below = next_gpus_below(config, gpus)
    more = f"; {below} is the next number below that one can use" if below else ""
    return (
        f"--gpus is {gpus}, and no layout of {', '.join(sizes)} and batches of "
        f"{config.training.global_batch_size} divides into it{more}. Use {', '.join(ways)}, or a "
        "larger batch (which changes m_B)."
    )


def why_none_fits(config: RunConfig, device: Device, gpus: int, nearest: Layout) -> str:
    """The message for a model that is too large: by how much, and what would fit."""
    memory, limit = nearest.memory, nearest.limit_bytes
    state = memory.parameters + memory.gradients + memory.masters + memory.moments
    return (
        f"{config.model.parameters / 1e9:.2f}B parameters do not fit on {gpus} x {device.name}: "
        f"the smallest layout ({describe(nearest)}) needs {memory.total / 1e9:.1f} GB a GPU, "
        f"{(memory.total - limit) / 1e9:.1f} GB more than the {limit / 1e9:.1f} GB that are "
        f"usable; {state / 1e9:.1f} GB of it are weights and optimizer state. "
        + _what_would_fit(config, device, gpus)
    )


def _what_would_fit(config: RunConfig, device: Device, gpus: int) -> str:
    """The next number of these GPUs, by doubling, and the other GPUs that hold the run."""

    def fits(on: Device, count: int) -> bool:
        return any(layout.fits for layout in every_layout(config, on, count, 1.0))

    counts = (gpus * 2**power for power in range(1, 7))
    ways = [f"{count} x {device.name}" for count in counts if fits(device, count)][:1]
    ways += [f"{gpus} x {other.name}" for other in DEVICES.values() if fits(other, gpus)]
    return f"{' or '.join(ways)} would do." if ways else "Shrink the model or seq_length."
