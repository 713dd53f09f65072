"""Which layouts a model can train in on N GPUs, best first, and what is missing where none fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_completedp.config.parallel import ParallelConfig, check_layout
from megatron_completedp.config.run import RunConfig
from megatron_completedp.errors import ConfigError
from megatron_completedp.plan.cost import Cost, step_cost
from megatron_completedp.plan.devices import DEVICES, GPUS_PER_NODE, Device
from megatron_completedp.plan.memory import Memory, Workload, peak_memory

#: Part of a GPU's memory that tensors may take; the rest is for the CUDA context, NCCL's buffers
#: and fragmentation. An assumption.
USABLE_MEMORY = 0.9

#: Step times within this factor are taken as equal: the estimate is not better than that.
TIE = 1.02

#: Virtual chunks per stage that are tried.
CHUNKS = (None, 2, 4, 8)


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
        """The flags that select this layout in a run."""
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
        words = [f"{flag} {value}" for flag, value in sizes.items() if value is not None]
        return " ".join(words + [flag for flag, on in switches.items() if on])


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


def rank_layouts(
    config: RunConfig, device: Device, *, gpus: int, utilization: float = 0.4
) -> Ranking:
    """Every layout of `config`'s model and batch on `gpus` GPUs, ranked by step time.

    Sizes and micro batches are tried; micro batches are at most the configuration's. Optimizer
    state is sharded and its communication overlapped where there are data-parallel ranks. Among
    step times that differ by less than the estimate is good for, the simpler layout wins.

    Raises ConfigError for numbers out of range, a precision without a GPU peak, a world that no
    layout divides, and a model that fits in none: by how much, and what would fit.
    """
    if gpus < 1:
        raise ConfigError(f"--gpus is {gpus}; expected at least 1.")
    if not 0 < utilization <= 1:
        raise ConfigError(f"--utilization is {utilization}; expected more than 0 and at most 1.")
    if config.training.precision != "bf16":
        raise ConfigError(
            f"training.precision is {config.training.precision}; GPU estimates are for bf16. Add "
            "--training.precision bf16."
        )
    layouts = list(_layouts(config, device, gpus, utilization))
    if not layouts:
        raise ConfigError(_why_none_divides(config, gpus))
    fitting = sorted((layout for layout in layouts if layout.fits), key=_preference)
    too_large = sorted(
        (layout for layout in layouts if not layout.fits), key=lambda layout: layout.memory.total
    )
    if not fitting:
        raise ConfigError(_why_none_fits(config, device, gpus, too_large[0]))
    fastest = fitting[0].cost.step_s
    ties = [layout for layout in fitting if layout.cost.step_s <= TIE * fastest]
    best = min(ties, key=_complexity)
    fitting.remove(best)
    return Ranking(
        device=device,
        gpus=gpus,
        utilization=utilization,
        steps=config.steps,
        fitting=(best, *fitting),
        too_large=tuple(too_large),
    )


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
    }
    if parallel.recompute_granularity == "full":
        losses["recomputation"] = cost.compute_s / 4
    worst = max(losses, key=losses.__getitem__)
    share = losses[worst] / cost.step_s
    words.append(
        f"largest loss: {worst}, {share:.1%} of the step"
        if share >= 0.001
        else "the step is matrix products alone, all else is below 0.1%"
    )
    plain = parallel.model_parallel_size == 1
    smaller = [layout for layout in ranking.too_large if _complexity(layout) < _complexity(best)]
    if plain and parallel.recompute_granularity == "none":
        words.insert(0, "a whole replica fits on one GPU, so nothing is split")
    elif smaller:
        nearest = smaller[0]
        over = (nearest.memory.total - nearest.limit_bytes) / 1e9
        words.insert(0, f"{describe(nearest)} would be simpler and is {over:.1f} GB too large")
    tie = any(layout.cost.step_s < cost.step_s for layout in ranking.fitting[1:])
    if tie:
        words.append(f"layouts up to {TIE - 1:.0%} faster exist and split more")
    return "; ".join(words) + f"; {spare:.1f} GB to spare."


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


def _layouts(config: RunConfig, device: Device, gpus: int, utilization: float) -> Iterator[Layout]:
    """Every layout that divides model, batch and GPUs, whether it fits or not."""
    shape, training = config.model, config.training
    for parallel in _parallels(config, gpus):
        dp = gpus // parallel.model_parallel_size
        for micro_batch in _divisors(training.micro_batch_size):
            micro_batches, rest = divmod(training.global_batch_size, micro_batch * dp)
            # Interleaved, a pipeline takes its micro batches in groups of its size.
            interleaved = parallel.virtual_pipeline_model_parallel_size is not None
            group = parallel.pipeline_model_parallel_size if interleaved else 1
            if rest or micro_batches % group:
                continue
            workload = Workload(
                data_parallel_size=dp,
                micro_batch_size=micro_batch,
                micro_batches=micro_batches,
                precision=training.precision,
            )
            yield Layout(
                parallel=parallel,
                workload=workload,
                memory=peak_memory(shape, parallel, workload),
                cost=step_cost(shape, parallel, workload, device, utilization=utilization),
                limit_bytes=USABLE_MEMORY * device.memory_bytes,
            )


def _parallels(config: RunConfig, gpus: int) -> Iterator[ParallelConfig]:
    for tp in _divisors(GPUS_PER_NODE):  # more would all-reduce over the network in every layer
        for pp in _divisors(config.model.num_layers):
            if gpus % (tp * pp):
                continue
            sharded = gpus > tp * pp
            for chunks in CHUNKS if pp > 1 else (None,):
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


def _preference(layout: Layout) -> tuple[float, tuple[int, ...]]:
    return layout.cost.step_s, _complexity(layout)


def _complexity(layout: Layout) -> tuple[int, ...]:
    """What to avoid when times are equal: splitting, chunks, recomputation, small micro batches."""
    parallel = layout.parallel
    return (
        parallel.model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size or 1,
        parallel.recompute_granularity == "full",
        -layout.workload.micro_batch_size,
        not parallel.sequence_parallel,  # it costs nothing and saves memory
    )


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _why_none_divides(config: RunConfig, gpus: int) -> str:
    """The message for a number of GPUs that no layout of this model and batch uses."""
    batch = config.training.global_batch_size
    below = next((count for count in range(gpus - 1, 0, -1) if _divides(config, count)), 0)
    more = f"; {below} is the next number below that one can use" if below else ""
    return (
        f"--gpus is {gpus}, and no layout of {config.model.num_layers} layers, "
        f"{config.model.num_attention_heads} heads and a batch of {batch} sequences divides into "
        f"it{more}. Use another number of GPUs, or a larger batch (which changes m_B)."
    )


def _divides(config: RunConfig, gpus: int) -> bool:
    return any(
        config.training.global_batch_size % (gpus // parallel.model_parallel_size) == 0
        for parallel in _parallels(config, gpus)
    )


def _why_none_fits(config: RunConfig, device: Device, gpus: int, nearest: Layout) -> str:
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
        return any(layout.fits for layout in _layouts(config, on, count, 1.0))

    counts = (gpus * 2**power for power in range(1, 7))
    ways = [f"{count} x {device.name}" for count in counts if fits(device, count)][:1]
    ways += [f"{gpus} x {other.name}" for other in DEVICES.values() if fits(other, gpus)]
    return f"{' or '.join(ways)} would do." if ways else "Shrink the model or seq_length."
