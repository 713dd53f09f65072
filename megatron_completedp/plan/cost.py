"""Time and traffic of one optimizer step, and GPU-hours of a run.

An estimate, with every part stated. FLOPs are the model's (`core.budget.model_flops_per_token`);
full recomputation runs the layers' forward pass again, a third of them without the readout's.

    compute   FLOPs / (GPUs x bf16 peak x utilization)
    bubble    compute x fraction; fraction = (PP - 1) / (micro batches x VPP), of 1F1B, interleaved
    tensor    TP's collectives, not hidden: per layer and micro batch, 4 all-reduces of a [tokens,
              hidden] tensor, or under SP as many all-gathers and reduce-scatters that move the
              same; SP gathers each linear layer's input once more for its weight gradient; full
              recomputation repeats the forward's half
    pipeline  [tokens, hidden] (/ TP under SP) to the next stage and its gradient back, per chunk
              and micro batch; of two stages, each has one end where nothing is sent
    data      reduce-scatter of fp32 gradients and all-gather of parameters, (DP - 1) / DP of them
              each; hidden behind the last micro batch's backward and the first one's forward pass
              where overlap is on, else in full
    update    weights, gradients, moments and masters read, and written back, at memory bandwidth

Utilization is of the matrix products alone, so that the step's own model FLOP/s utilization comes
out below it. Ranks are laid out TP first, then DP, then PP, as Megatron does. A group within a node
of 8 communicates at NVLink's speed; a data-parallel group over several nodes through the 8 / TP
ports of its members in a node together, at most at NVLink's speed; stages send through a port each.
All of it times `LINK_EFFICIENCY`. Latency, load imbalance (the readout's stage) and stragglers are
not modelled.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_completedp.config.parallel import ParallelConfig
from megatron_completedp.core.budget import model_flops_per_token
from megatron_completedp.core.roles import Module
from megatron_completedp.core.shape import ModelShape
from megatron_completedp.plan.devices import GPUS_PER_NODE, Device
from megatron_completedp.plan.memory import Workload, outer_stages, rank_modules

#: Part of a link's bandwidth that large collectives reach; an assumption.
LINK_EFFICIENCY = 0.7


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that one rank sends in one step."""

    tensor: float
    pipeline: float
    data: float


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds of one step by cause, and what follows."""

    compute_s: float
    recompute_s: float
    """Of compute, the second forward pass of full recomputation."""
    bubble_s: float
    tensor_s: float
    pipeline_s: float
    data_s: float
    """What overlap does not hide."""
    update_s: float
    traffic: Traffic
    bubble_fraction: float
    """Idle time over busy time of the pipeline."""
    useful_s: float
    """What the model's FLOPs alone would take at peak."""

    @property
    def step_s(self) -> float:
        """Seconds of one optimizer step."""
        return (
            self.compute_s
            + self.bubble_s
            + self.tensor_s
            + self.pipeline_s
            + self.data_s
            + self.update_s
        )

    @property
    def model_flops_utilization(self) -> float:
        """Of the whole step; recomputation is not counted as useful."""
        return self.useful_s / self.step_s


def bubble_fraction(parallel: ParallelConfig, micro_batches: int) -> float:
    """Idle over busy time of a pipeline: (PP - 1) / (micro batches x VPP)."""
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    return (parallel.pipeline_model_parallel_size - 1) / (micro_batches * chunks)


def traffic(shape: ModelShape, parallel: ParallelConfig, workload: Workload) -> Traffic:
    """Bytes that the busiest rank sends in one step, by what for."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    dp, width = workload.data_parallel_size, 2 if workload.precision == "bf16" else 4
    stream = workload.micro_batch_size * shape.seq_length * shape.hidden_size * width
    # A ring sends (n - 1) / n of the tensor for a gather or a scatter and twice that for a sum.
    halves = 8 + (2 if parallel.sequence_parallel else 0)
    if parallel.recompute_granularity == "full":
        halves += 4
    per_layer = halves * stream * (tp - 1) / tp
    # The busiest stage is one in the middle; of two, one sends no gradient, the other no output.
    sends = 0 if pp == 1 else 2 * chunks - (pp == 2)
    sent = stream / (tp if parallel.sequence_parallel else 1)
    elements = max(
        sum(rank_modules(shape, parallel, stage).values()) for stage in outer_stages(parallel)
    )
    gathered = width if parallel.use_distributed_optimizer else 4  # an all-reduce of gradients
    return Traffic(
        tensor=workload.micro_batches * per_layer * shape.num_layers / pp,
        pipeline=workload.micro_batches * sends * sent,
        data=elements * (4 + gathered) * (dp - 1) / dp,
    )


def step_cost(
    shape: ModelShape,
    parallel: ParallelConfig,
    workload: Workload,
    device: Device,
    *,
    utilization: float,
) -> Cost:
    """The parts of one step on `device`; utilization in (0, 1]."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    dp = workload.data_parallel_size
    gpus = tp * pp * dp
    tokens = workload.micro_batch_size * workload.micro_batches * dp * shape.seq_length
    useful = tokens * model_flops_per_token(shape) / gpus / device.bf16_flops
    recomputed = (
        useful * _layers_forward(shape) if parallel.recompute_granularity == "full" else 0.0
    )
    compute = (useful + recomputed) / utilization
    sent = traffic(shape, parallel, workload)
    data = sent.data / _bandwidth(device, tp * dp, ports=max(1, GPUS_PER_NODE // tp))
    if parallel.overlap_grad_reduce:
        data = max(0.0, data - compute / workload.micro_batches)
    fraction = bubble_fraction(parallel, workload.micro_batches)
    return Cost(
        compute_s=compute,
        recompute_s=recomputed / utilization,
        bubble_s=compute * fraction,
        tensor_s=sent.tensor / _bandwidth(device, tp),
        pipeline_s=sent.pipeline / _bandwidth(device, gpus),
        data_s=data,
        update_s=_update_bytes(shape, parallel, workload) / device.memory_bandwidth,
        traffic=sent,
        bubble_fraction=fraction,
        useful_s=useful,
    )


def _layers_forward(shape: ModelShape) -> float:
    """The layers' forward pass as a part of the model's FLOPs: a third of all but the readout."""
    readout = Module.EMBEDDING if shape.tied_embeddings else Module.UNEMBEDDING
    return (1 - 6 * shape.module_parameters(readout) / model_flops_per_token(shape)) / 3


def _bandwidth(device: Device, span: int, *, ports: int = 1) -> float:
    """Bytes per second of one rank in a group that spans `span` consecutive GPUs.

    Beyond a node, `ports` of the group's members share their network ports there.
    """
    link = device.nvlink_bandwidth
    if span > GPUS_PER_NODE:
        link = min(link, ports * device.network_bandwidth)
    return link * LINK_EFFICIENCY


def _update_bytes(shape: ModelShape, parallel: ParallelConfig, workload: Workload) -> float:
    """Bytes that AdamW moves on the fullest rank: 12 fp32 bytes an element both ways, gradients."""
    elements = max(
        sum(rank_modules(shape, parallel, stage).values()) for stage in outer_stages(parallel)
    )
    shards = workload.data_parallel_size if parallel.use_distributed_optimizer else 1
    copied = 2 if workload.precision == "bf16" else 0
    return elements / shards * (2 * 12 + 4 + copied)
