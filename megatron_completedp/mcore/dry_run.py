"""Build the ranks of a large run one by one, without its GPUs, and account for every element.

Data-parallel replicas hold the same part of the model by construction: layers and shards of a rank
depend on its TP and PP coordinates alone, and how a replica's optimizer is shared out follows from
the buffers, which Megatron's own function cuts for every data-parallel rank. The sample is
therefore one whole replica, the first, and of the last one the corners of TP x PP, which differ
from it in all that a data-parallel rank may change.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch.distributed as dist
from megatron.core import parallel_state
from tqdm import tqdm

from megatron_completedp.config.parallel import ParallelConfig
from megatron_completedp.config.run import RunConfig, check_world
from megatron_completedp.errors import ConfigError
from megatron_completedp.mcore.inventory import Inventory, check_inventory, sum_inventories
from megatron_completedp.mcore.platform import CpuPlatform
from megatron_completedp.mcore.rank_builder import record_rank
from megatron_completedp.mcore.rank_checks import check_memory, check_replicas, check_saved
from megatron_completedp.mcore.rank_record import RankRecord
from megatron_completedp.mcore.simulated_rank import simulated_rank
from megatron_completedp.plan.memory import Workload, stage_memory
from megatron_completedp.plan.run_plan import Plan


@dataclass(frozen=True, kw_only=True)
class DryRunReport:
    """What a dry run built; it exists only when every check passed."""

    parallel: ParallelConfig
    world_size: int
    """Ranks of the simulated run; all of them are accounted for."""
    total_parameters: int
    """Elements of the whole model, each counted once."""
    saved: dict[str, int]
    """Elements by kind of state in a checkpoint, each written once."""
    boxes: int
    """Tensors that the ranks write into a checkpoint."""
    records: tuple[RankRecord, ...]
    """The ranks that were built."""
    cpu_s: float
    """CPU time of the dry run, which has one thread."""

    def __str__(self) -> str:
        """A paragraph with one line for each check."""
        parallel, records = self.parallel, self.records
        replicas = self.world_size // parallel.model_parallel_size
        states = [record.state for record in records]
        shards = [len(of) for record in _first_replica(records) for of in record.shards]
        segments = [record.segments for record in records]
        built = "all of them" if len(records) == self.world_size else f"{len(records):,} of them"
        lines = [
            f"dry run of {self.world_size:,} ranks (TP {parallel.tensor_model_parallel_size}, PP "
            f"{parallel.pipeline_model_parallel_size}, DP {replicas}), {built} built, in "
            f"{self.cpu_s:.0f} s of CPU",
            f"  parameters   {_span(record.elements for record in records)} a rank; "
            f"{self.total_parameters:,} over TP x PP = the model",
            f"  optimizer    {sum(shards):,} shards on all ranks ({_span(shards)} a rank) cover "
            "every element once",
            f"  segments     {_span(segments)} a rank, each with its module's hyperparameters",
            f"  checkpoint   {self.boxes:,} tensors cover every element once: "
            + ", ".join(f"{kind} {count:,}" for kind, count in self.saved.items()),
            "  memory       equal to plan's, in GB a rank: "
            + ", ".join(
                f"{name} {_span((getattr(s, name) / 1e9 for s in states), '.3f')}"
                for name in ("parameters", "gradients", "masters", "moments")
            )
            + f"; padding up to {max(s.padding for s in states) / 1e6:.3f} MB",
            "  not built    activations, communication buffers, random states and data",
        ]
        return "\n".join(lines)


def dry_run(plan: Plan, *, world_size: int, all_ranks: bool = False) -> DryRunReport:
    """Build ranks of `plan`'s run on `world_size` GPUs, and check that nothing is lost or doubled.

    No GPU is touched: the process becomes a CPU process (see `CpuPlatform.install`), also where
    there is one, so do not train in it afterwards.

    Args:
        plan: the run; its layout is `plan.config.parallel`.
        world_size: ranks of the run.
        all_ranks: build every rank instead of the sample (same checks, DP times the work).

    Raises:
        ConfigError: layout, batch and world do not fit, or torch.distributed is in use here.
        ClassificationError: a parameter has no module, a replica's sum is not the model, or an
            element has no optimizer, two, or another module's hyperparameters.
        CheckpointError: an element would be saved by nobody or twice.
        CompletedPError: a rank does not take the bytes that `plan` says.

    """
    started = time.process_time()
    config = plan.config
    if world_size < 1:
        raise ConfigError(f"the world size is {world_size}; expected at least 1 rank.")
    check_world(config, world_size)
    if dist.is_initialized():
        raise ConfigError(
            "torch.distributed is initialized in this process; a dry run simulates a world of its "
            "own. Run it in a fresh process, or before initializing."
        )
    CpuPlatform().install()
    gc.collect()
    gc.freeze()  # Megatron collects garbage in every state dict, at a second for torch's objects
    try:
        records = _build(plan, world_size, all_ranks)
    finally:
        gc.unfreeze()
    total = _check_inventories(plan, records, world_size)
    saved = [box for record in records for box in record.saved]
    kinds = check_saved(saved, config.model.parameters, kinds=_saved_kinds(config))
    _check_memory(plan, records, world_size)
    return DryRunReport(
        parallel=config.parallel,
        world_size=world_size,
        total_parameters=sum(total.values()),
        saved=dict(kinds),
        boxes=len(saved),
        records=tuple(records),
        cpu_s=time.process_time() - started,
    )


def _build(plan: Plan, world_size: int, all_ranks: bool) -> list[RankRecord]:
    """The records of all ranks, or of the sample; the first replica's come first, if not all."""
    parallel = plan.config.parallel
    with simulated_rank(0, world_size, parallel):
        replica = dist.get_process_group_ranks(parallel_state.get_model_parallel_group())
    replicas = world_size // parallel.model_parallel_size
    corners = 0 if all_ranks or replicas == 1 else len(_corner_places(parallel))
    ranks = list(range(world_size)) if all_ranks else list(replica)
    records: list[RankRecord] = []
    first: dict[tuple[int, int], RankRecord] = {}
    with tqdm(total=len(ranks) + corners, unit="rank", disable=None) as bar:

        def build(rank: int) -> None:
            with simulated_rank(rank, world_size, parallel):
                record = record_rank(plan)
            original = first.setdefault((record.place.tp_rank, record.place.pp_rank), record)
            check_replicas(original, record)
            # What is equal is kept once: thousands of ranks, each with the shards of all.
            records.append(replace(record, tensors=original.tensors, shards=original.shards))
            bar.update()

        for rank in ranks:
            build(rank)
        if corners:
            for record in list(records):
                if (record.place.tp_rank, record.place.pp_rank) in _corner_places(parallel):
                    build(record.data_parallel_ranks[-1])
    return records


def _corner_places(parallel: ParallelConfig) -> set[tuple[int, int]]:
    """(TP rank, PP rank) of the first and the last rank of both axes."""
    return {
        (tp_rank, pp_rank)
        for tp_rank in (0, parallel.tensor_model_parallel_size - 1)
        for pp_rank in (0, parallel.pipeline_model_parallel_size - 1)
    }


def _check_inventories(plan: Plan, records: Sequence[RankRecord], world_size: int) -> Inventory:
    """The whole model by module and layer, after every replica added up to it."""
    covered = [rank for record in _first_replica(records) for rank in record.data_parallel_ranks]
    assert sorted(covered) == list(range(world_size)), "data-parallel groups do not tile the world"
    replicas: dict[int, dict[tuple[int, int], Inventory]] = {}
    for record in records:
        place = record.place
        replicas.setdefault(place.dp_rank, {})[place.pp_rank, place.tp_rank] = record.counts
    for counts in replicas.values():
        if len(counts) == plan.config.parallel.model_parallel_size:
            check_inventory(sum_inventories(counts), plan.config.model)
    return sum_inventories(replicas[0])


def _saved_kinds(config: RunConfig) -> set[str]:
    """The kinds of state that Megatron's optimizer of this layout and precision saves."""
    kinds = {"weights", "exp_avg", "exp_avg_sq"}
    if config.parallel.use_distributed_optimizer:
        kinds.add("param")
    elif config.training.precision == "bf16":
        kinds.add("fp32_param")
    return kinds


def _check_memory(plan: Plan, records: Iterable[RankRecord], world_size: int) -> None:
    config = plan.config
    replicas = world_size // config.parallel.model_parallel_size
    workload = Workload(
        data_parallel_size=replicas,
        micro_batch_size=config.training.micro_batch_size,
        micro_batches=config.training.global_batch_size
        // (config.training.micro_batch_size * replicas),
        precision=config.training.precision,
    )
    for record in records:
        stage = record.place.pp_rank
        check_memory(record, stage_memory(config.model, config.parallel, workload, stage))


def _first_replica(records: Iterable[RankRecord]) -> list[RankRecord]:
    return [record for record in records if record.place.dp_rank == 0]


def _span(values: Iterable[float], form: str = ",") -> str:
    """`5`, or `3 to 5` where they differ."""
    numbers = sorted(values)
    low, high = format(numbers[0], form), format(numbers[-1], form)
    return low if low == high else f"{low} to {high}"
