"""Every way to split a run over N GPUs, with what it needs and costs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_completedp.config.parallel import ParallelConfig, check_layout
from megatron_completedp.config.run import RunConfig
from megatron_completedp.errors import ConfigError
from megatron_completedp.plan.cost import Cost, step_cost
from megatron_completedp.plan.devices import GPUS_PER_NODE, Device
from megatron_completedp.plan.memory import Memory, Workload, peak_memory

#: Part of a GPU's memory that tensors may take; the rest is for the CUDA context, NCCL's buffers
#: and fragmentation. An assumption.
USABLE_MEMORY = 0.9

#: Step times within this factor are taken as equal: the estimate is not better than that.
TIE = 1.02


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to split a run, with what it needs and costs."""

    parallel: ParallelConfig
    workload: Workload
    memory: Memory
    """Of the fullest rank."""
    cost: Cost
    limit_bytes: float
    """What a rank may use."""

    @property
    def fits(self) -> bool:
        """Whether the fullest rank stays within the limit."""
        return self.memory.total <= self.limit_bytes

    @property
    def flags(self) -> str:
        """The flags that select this layout in a run, whatever its YAML says of another."""
        parallel = self.parallel
        sizes = {
            "--tensor-model-parallel-size": parallel.tensor_model_parallel_size,
            "--pipeline-model-parallel-size": parallel.pipeline_model_parallel_size,
            "--virtual-pipeline-model-parallel-size": parallel.virtual_pipeline_model_parallel_size,
            "--micro-batch-size": self.workload.micro_batch_size,
            "--recompute-granularity": parallel.recompute_granularity,
        }
        switches = {
            "--sequence-parallel": parallel.sequence_parallel,
            "--use-distributed-optimizer": parallel.use_distributed_optimizer,
            "--overlap-grad-reduce": parallel.overlap_grad_reduce,
            "--overlap-param-gather": parallel.overlap_param_gather,
        }
        words = [f"{flag} {value}" for flag, value in sizes.items()]
        off = {flag: f"--no-{flag.removeprefix('--')}" for flag in switches}
        return " ".join(words + [flag if on else off[flag] for flag, on in switches.items()])


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """All layouts of a run on some GPUs."""

    device: Device
    gpus: int
    utilization: float
    steps: int
    fitting: tuple[Layout, ...]
    """Best first."""
    too_large: tuple[Layout, ...]
    """Those that need more memory, the nearest first."""

    @property
    def best(self) -> Layout:
        """The recommended layout."""
        return self.fitting[0]

    def gpu_hours(self, layout: Layout) -> float:
        """GPU-hours of the whole run in `layout`, without evaluation, saving and restarts."""
        return self.steps * layout.cost.step_s * self.gpus / 3600


def every_layout(
    config: RunConfig, device: Device, gpus: int, utilization: float
) -> Iterator[Layout]:
    """Every layout that divides model, batch, evaluation and GPUs, whether it fits or not.

    TP stays within a node, PP and VPP divide the layers, micro batches the configuration's.
    """
    shape, training = config.model, config.training
    for parallel, micro_batch in _splits(config, gpus):
        dp = gpus // parallel.model_parallel_size
        workload = Workload(
            data_parallel_size=dp,
            micro_batch_size=micro_batch,
            micro_batches=training.global_batch_size // (micro_batch * dp),
            precision=training.precision,
        )
        yield Layout(
            parallel=parallel,
            workload=workload,
            memory=peak_memory(shape, parallel, workload),
            cost=step_cost(shape, parallel, workload, device, utilization=utilization),
            limit_bytes=USABLE_MEMORY * device.memory_bytes,
        )


def next_gpus_below(config: RunConfig, gpus: int) -> int:
    """The largest number of GPUs below `gpus` that some layout divides into; 0 if there is none."""
    replicas = _divisors(math.gcd(*_sequence_counts(config)))
    tensors, stages = _divisors(GPUS_PER_NODE), _divisors(config.model.num_layers)
    counts = {dp * tp * pp for dp in replicas for tp in tensors for pp in stages}
    below = sorted((count for count in counts if count < gpus), reverse=True)
    return next((count for count in below if any(_splits(config, count))), 0)


def complexity(layout: Layout) -> tuple[int, ...]:
    """What to avoid when times are equal: splitting, chunks, recomputation, small micro batches."""
    parallel = layout.parallel
    return (
        parallel.model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size or 1,
        parallel.recompute_granularity == "full",
        -layout.workload.micro_batch_size,
        not parallel.sequence_parallel,  # it costs nothing and saves memory
    )


def _splits(config: RunConfig, gpus: int) -> Iterator[tuple[ParallelConfig, int]]:
    """Layouts and sizes of a micro batch that `config.run.check_world` takes."""
    for parallel in _parallels(config, gpus):
        # Interleaved, a pipeline takes its micro batches in groups of its size.
        interleaved = parallel.virtual_pipeline_model_parallel_size is not None
        group = parallel.pipeline_model_parallel_size if interleaved else 1
        replicas = gpus // parallel.model_parallel_size
        for micro_batch in _divisors(config.training.micro_batch_size):
            unit = micro_batch * replicas * group
            if not any(count % unit for count in _sequence_counts(config)):
                yield parallel, micro_batch


def _sequence_counts(config: RunConfig) -> list[int]:
    """Sequences of what all replicas share: a batch, and an evaluation."""
    evaluation = [config.evaluation.samples] if config.evaluation.interval else []
    return [config.training.global_batch_size, *evaluation]


def _parallels(config: RunConfig, gpus: int) -> Iterator[ParallelConfig]:
    for tp in _divisors(GPUS_PER_NODE):  # more would all-reduce over the network in every layer
        for pp in _divisors(config.model.num_layers):
            if gpus % (tp * pp):
                continue
            sharded = gpus > tp * pp
            stage = config.model.num_layers // pp
            for chunks in (None, *_divisors(stage)[1:]) if pp > 1 else (None,):
                for sequence in (False, True) if tp > 1 else (False,):
                    layout = ParallelConfig(
                        tensor_model_parallel_size=tp,
                        pipeline_model_parallel_size=pp,
                        virtual_pipeline_model_parallel_size=chunks,
                        sequence_parallel=sequence,
                        use_distributed_optimizer=sharded,
                        overlap_grad_reduce=sharded,
                        overlap_param_gather=sharded,
                    )
                    try:
                        check_layout(config.model, layout)
                    except ConfigError:
                        continue
                    yield layout
                    yield replace(layout, recompute_granularity="full")


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
