"""Step time: the bubble against a simulated pipeline, traffic and parts by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from plan_samples import SHAPE

from megatron_completedp.config.parallel import ParallelConfig
from megatron_completedp.core.budget import model_flops_per_token
from megatron_completedp.plan.cost import bubble_fraction, step_cost, traffic
from megatron_completedp.plan.devices import DEVICES
from megatron_completedp.plan.memory import Workload

WORK = Workload(data_parallel_size=1, micro_batch_size=2, micro_batches=8, precision="bf16")
H100 = DEVICES["H100"]


def order(stage: int, stages: int, chunks: int, micro_batches: int) -> list[tuple[str, int, int]]:
    """(pass, chunk, micro batch) in the order a stage runs them, plain or interleaved 1F1B."""

    def passes(backward: bool) -> list[tuple[str, int, int]]:
        found = []
        for group in range(0, micro_batches, stages if chunks > 1 else micro_batches):
            size = stages if chunks > 1 else micro_batches
            for chunk in reversed(range(chunks)) if backward else range(chunks):
                found += [("b" if backward else "f", chunk, group + i) for i in range(size)]
        return found

    forward, backward = passes(False), passes(True)
    warmup = stages - stage - 1
    if chunks > 1:
        warmup = 2 * warmup + (chunks - 1) * stages
    warmup = min(warmup, len(forward))
    steady = len(forward) - warmup
    mixed = [
        item for pair in zip(forward[warmup:], backward[:steady], strict=True) for item in pair
    ]
    return forward[:warmup] + mixed + backward[steady:]


def simulated(stages: int, chunks: int, micro_batches: int) -> tuple[float, list[int]]:
    """Idle over busy time of the simulated schedule, and the most chunks in flight by stage.

    A forward pass of a whole stage takes 1, a backward 2; a pass waits for its neighbour's.
    """
    queues = [order(stage, stages, chunks, micro_batches) for stage in range(stages)]
    free, done = [0.0] * stages, {}
    most, held = [0] * stages, [0] * stages
    while any(queues):
        moved = False
        for stage, queue in enumerate(queues):
            while queue:
                kind, chunk, micro = queue[0]
                place = chunk * stages + stage + (-1 if kind == "f" else 1)
                if 0 <= place < stages * chunks:
                    needs = (kind, place, micro)
                else:
                    needs = None if kind == "f" else ("f", chunk * stages + stage, micro)
                if needs is not None and needs not in done:
                    break
                start = max(free[stage], done.get(needs, 0.0) if needs else 0.0)
                free[stage] = start + (1 if kind == "f" else 2) / chunks
                done[kind, chunk * stages + stage, micro] = free[stage]
                held[stage] += 1 if kind == "f" else -1
                most[stage] = max(most[stage], held[stage])
                queue.pop(0)
                moved = True
        assert moved, "the schedule waits for itself"
    busy = 3 * micro_batches
    return (max(free) - busy) / busy, most


@pytest.mark.parametrize(
    ("stages", "chunks", "micro_batches"),
    [(1, 1, 4), (2, 1, 4), (4, 1, 4), (4, 1, 16), (2, 2, 4), (4, 2, 8), (4, 4, 16), (8, 2, 16)],
)
def test_bubble_is_the_simulated_schedules(stages: int, chunks: int, micro_batches: int) -> None:
    parallel = ParallelConfig(
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
    )
    idle, most = simulated(stages, chunks, micro_batches)
    assert bubble_fraction(parallel, micro_batches) == pytest.approx(idle)
    # What memory.py takes as in flight on the first stage.
    warmup = stages - 1 if chunks == 1 else 2 * (stages - 1) + (chunks - 1) * stages
    assert most[0] == min(warmup + 1, micro_batches * chunks)


def test_the_simulation_sees_a_wrong_formula() -> None:
    """Negative control: without interleaving's factor the formula is off by it."""
    idle, _ = simulated(4, 2, 8)
    assert bubble_fraction(ParallelConfig(pipeline_model_parallel_size=4), 8) == 2 * idle


def sends(stages: int, chunks: int) -> int:
    """Tensors the busiest stage sends for a micro batch: all but the ends send on, and back."""
    last = stages * chunks - 1
    places = [[chunk * stages + stage for chunk in range(chunks)] for stage in range(stages)]
    return max(sum((place < last) + (place > 0) for place in mine) for mine in places)


def test_traffic_by_hand() -> None:
    stream = 2 * 64 * 128 * 2
    tp2 = ParallelConfig(tensor_model_parallel_size=2)
    sent = traffic(SHAPE, tp2, WORK)
    # 4 all-reduces a layer and micro batch; a ring of 2 sends the tensor once in each.
    assert sent.tensor == 8 * 8 * 4 * stream
    assert sent.pipeline == sent.data == 0
    sp = replace(tp2, sequence_parallel=True)
    assert traffic(SHAPE, sp, WORK).tensor == sent.tensor * 10 / 8
    for stages, chunks in ((2, 1), (2, 2), (4, 1), (4, 2), (8, 1)):
        pipeline = ParallelConfig(
            pipeline_model_parallel_size=stages,
            virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        )
        assert traffic(SHAPE, pipeline, WORK).pipeline == 8 * stream * sends(stages, chunks)
    assert sends(2, 1) == 1
    dp2 = replace(WORK, data_parallel_size=2)
    sharded = ParallelConfig(use_distributed_optimizer=True)
    assert traffic(SHAPE, sharded, dp2).data == SHAPE.parameters * (4 + 2) / 2


def test_one_gpu_is_flops_over_peak() -> None:
    cost = step_cost(SHAPE, ParallelConfig(), WORK, H100, utilization=0.5)
    flops = 8 * 2 * 64 * model_flops_per_token(SHAPE)
    assert cost.compute_s == pytest.approx(flops / 989e12 / 0.5)
    assert cost.bubble_s == cost.tensor_s == cost.pipeline_s == cost.data_s == 0
    assert cost.model_flops_utilization < 0.5
    recomputed = ParallelConfig(recompute_granularity="full")
    again = step_cost(SHAPE, recomputed, WORK, H100, utilization=0.5)
    # A third again of all but the readout, which Megatron does not recompute.
    readout = 8 * 2 * 64 * 6 * 512 * 128 / 989e12 / 0.5
    assert again.recompute_s == pytest.approx((cost.compute_s - readout) / 3)
    assert again.compute_s == pytest.approx(cost.compute_s + again.recompute_s)
    assert cost.recompute_s == 0


def test_recomputation_of_tied_embeddings_leaves_out_the_readout() -> None:
    """The readout's FLOPs are the embedding's, which has the same size."""
    recomputed = ParallelConfig(recompute_granularity="full")
    one, other = (
        step_cost(shape, recomputed, WORK, H100, utilization=0.5)
        for shape in (SHAPE, replace(SHAPE, tied_embeddings=True))
    )
    assert one.recompute_s == other.recompute_s > 0


def test_overlap_hides_traffic_and_the_network_is_slower() -> None:
    plain = ParallelConfig(use_distributed_optimizer=True)
    overlap = replace(plain, overlap_grad_reduce=True, overlap_param_gather=True)
    inside, outside = (replace(WORK, data_parallel_size=n) for n in (8, 512))
    exposed = step_cost(SHAPE, plain, outside, H100, utilization=0.5)
    assert step_cost(SHAPE, overlap, outside, H100, utilization=0.5).data_s < exposed.data_s
    tp8 = ParallelConfig(tensor_model_parallel_size=4)
    near = step_cost(SHAPE, tp8, replace(inside, data_parallel_size=2), H100, utilization=0.5)
    far = step_cost(SHAPE, tp8, replace(inside, data_parallel_size=4), H100, utilization=0.5)
    assert far.data_s > 2 * near.data_s  # two ports of a node against NVLink
