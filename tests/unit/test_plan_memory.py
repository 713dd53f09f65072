"""The memory model: small cases by hand, sums over ranks, and what must fall with what."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from plan_samples import SHAPE

from megatron_completedp.config.parallel import ParallelConfig
from megatron_completedp.core.roles import GAIN_ROLES, MODULE_ROLES, OUTSIDE_STACK, Module
from megatron_completedp.plan.memory import Workload, peak_memory, rank_modules, stage_memory

WORK = Workload(data_parallel_size=4, micro_batch_size=2, micro_batches=8, precision="bf16")


def layout(tp: int = 1, pp: int = 1, **changes: object) -> ParallelConfig:
    sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    return ParallelConfig(**{**sizes, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(("tp", "pp"), list(product((1, 2, 4), (1, 2, 4, 8))))
@pytest.mark.parametrize("tied", [False, True])
def test_ranks_sum_to_the_model(tp: int, pp: int, tied: bool) -> None:
    """Matrices over TP ranks and stages, gains over stages: every element once."""
    shape = replace(SHAPE, tied_embeddings=tied)
    parallel = layout(tp, pp)
    total = 0
    for stage in range(pp):
        for module, elements in rank_modules(shape, parallel, stage).items():
            split = 1 if MODULE_ROLES[module] in GAIN_ROLES else tp
            copy = tied and pp > 1 and stage == pp - 1 and module is Module.EMBEDDING
            total += 0 if copy else elements * split
    assert total == shape.parameters


def test_weights_and_optimizer_by_hand() -> None:
    """N elements: bf16 2 N + 4 N, and 12 N of masters and moments over 4 ranks; fp32 16 N."""
    n = SHAPE.parameters
    sharded = stage_memory(SHAPE, layout(use_distributed_optimizer=True), WORK, 0)
    assert sharded.parameters + sharded.gradients == 6 * n
    assert sharded.masters + sharded.moments == 12 * n / 4
    whole = stage_memory(SHAPE, layout(), WORK, 0)
    assert whole.masters + whole.moments == 12 * n
    fp32 = stage_memory(SHAPE, layout(), replace(WORK, precision="fp32"), 0)
    assert fp32.parameters + fp32.gradients + fp32.masters + fp32.moments == 16 * n


def test_activations_by_hand() -> None:
    """The table of the module's text, added up for one layer without grouped queries, in bf16."""
    parallel, h, f, heads, d, s = layout(), 128, 352, 4, 32, 64
    one, two = (
        stage_memory(replace(SHAPE, num_layers=layers), parallel, WORK, 0).activations
        for layers in (1, 2)
    )
    elements = 2 * h + 3 * h + 2 * h + h + 2 * h + 3 * f
    per_token = 2 * elements + 4 * heads + 4 * 2 * heads + 4 * 2  # lse, q and k rows, two norms
    assert two - one == 2 * s * per_token + 2 * 4 * d * s
    # The loss at its peak: log-probabilities, gradient and its bf16 copy, of 2 x 64 tokens.
    assert stage_memory(SHAPE, parallel, WORK, 0).working == 2 * s * 512 * (8 + 2)


def test_recomputation_keeps_inputs() -> None:
    full = stage_memory(SHAPE, layout(recompute_granularity="full"), WORK, 0)
    none = stage_memory(SHAPE, layout(), WORK, 0)
    stream = 2 * 64 * 128 * 2  # one layer's input in bf16
    ending = 2 * 64 * (2 * 128 * 2 + 4)  # final norm: input, output and a row's fp32 scale
    assert full.activations == 8 * stream + ending
    assert full.total < none.total


@pytest.mark.parametrize("sequence", [False, True])
def test_memory_falls_with_every_split(sequence: bool) -> None:
    for first, second in ((1, 2), (2, 4)):
        assert (
            peak_memory(SHAPE, layout(second), WORK).total
            < peak_memory(SHAPE, layout(first), WORK).total
        )
        sharded = layout(use_distributed_optimizer=True)
        assert (
            peak_memory(SHAPE, sharded, replace(WORK, data_parallel_size=second)).total
            < peak_memory(SHAPE, sharded, replace(WORK, data_parallel_size=first)).total
        )
        assert (
            stage_memory(SHAPE, layout(pp=second), WORK, 0).parameters
            < stage_memory(SHAPE, layout(pp=first), WORK, 0).parameters
        )
    if sequence:
        split = stage_memory(SHAPE, layout(2, sequence_parallel=True), WORK, 0)
        assert split.activations < stage_memory(SHAPE, layout(2), WORK, 0).activations


def test_memory_does_not_fall_where_nothing_is_split() -> None:
    """Negative control: data parallelism alone shards nothing, and a pipeline fills up again."""
    alone = {peak_memory(SHAPE, layout(), replace(WORK, data_parallel_size=n)) for n in (1, 8)}
    assert len(alone) == 1
    one, two = (stage_memory(SHAPE, layout(pp=pp), WORK, 0).activations for pp in (2, 4))
    assert two == pytest.approx(one, rel=0.05)  # half the layers, twice the micro batches


@pytest.mark.parametrize(
    ("pp", "chunks", "work"), [(2, None, 8), (4, None, 8), (4, 2, 8), (8, None, 3)]
)
@pytest.mark.parametrize("tied", [False, True])
def test_the_outer_stages_hold_the_most(pp: int, chunks: int | None, work: int, tied: bool) -> None:
    parallel = layout(pp=pp, virtual_pipeline_model_parallel_size=chunks)
    shape, workload = replace(SHAPE, tied_embeddings=tied), replace(WORK, micro_batches=work)
    stages = [stage_memory(shape, parallel, workload, stage).total for stage in range(pp)]
    assert peak_memory(shape, parallel, workload).total == max(stages)


def test_outside_stack_is_on_the_outer_stages() -> None:
    assert not set(rank_modules(SHAPE, layout(pp=4), 1)) & OUTSIDE_STACK
    assert set(rank_modules(SHAPE, layout(pp=4), 0)) & OUTSIDE_STACK == {Module.EMBEDDING}
