"""The dry run accounts for every rank, notices what is lost, and leaves the process clean."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_completedp.config.parallel import ParallelConfig
from megatron_completedp.core.roles import Module
from megatron_completedp.core.shape import ModelShape
from megatron_completedp.errors import ClassificationError, ConfigError
from megatron_completedp.mcore import dry_run as subject
from megatron_completedp.mcore.classify import ClassifiedParameter
from megatron_completedp.mcore.dry_run import dry_run

SMALL: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 16,
    "ffn_hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "head_dim": 4,
    "vocab_size": 250,
    "seq_length": 8,
}
DENSE_7B = ModelShape(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    head_dim=128,
    vocab_size=50432,
    seq_length=4096,
)
TP2_PP2 = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)


def test_the_report_counts_ranks_and_parameters() -> None:
    shape = ModelShape(**SMALL)
    report = dry_run(shape, TP2_PP2, world_size=12)
    assert (report.world_size, report.ranks_built) == (12, 4)
    assert report.total_parameters == shape.parameters
    # Written out: half of two layers' matrices, their gains whole (2 of 16, 2 of 4), and half of
    # an embedding of 256 x 16; the last stage has the final norm besides.
    matrices = (16 * (16 + 8 + 8 + 16) + 3 * 32 * 16) // 2
    first_stage = 2 * (matrices + 2 * 16 + 2 * 4) + 256 * 16 // 2
    assert report.min_parameters == first_stage
    assert report.max_parameters == first_stage + 16
    assert "12 ranks covered by 4 built" in report.describe()


def test_all_ranks_builds_the_replicas_too() -> None:
    shape = ModelShape(**SMALL)
    report = dry_run(shape, TP2_PP2, world_size=8, all_ranks=True)
    assert (report.ranks_built, report.total_parameters) == (8, shape.parameters)


@pytest.mark.parametrize("chunks", [None, 2])
@pytest.mark.parametrize("changes", [{"tied_embeddings": True}, {"activation": "gelu"}])
def test_variants_add_up(changes: dict[str, Any], chunks: int | None) -> None:
    shape = ModelShape(**(SMALL | changes))
    parallel = ParallelConfig(
        pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=chunks
    )
    assert dry_run(shape, parallel, world_size=4).total_parameters == shape.parameters


@pytest.mark.parametrize("chunks", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_of_2048_ranks_takes_less_than_a_minute(chunks: int | None) -> None:
    parallel = ParallelConfig(
        tensor_model_parallel_size=8,
        pipeline_model_parallel_size=4,
        virtual_pipeline_model_parallel_size=chunks,
    )
    started = time.process_time()
    report = dry_run(DENSE_7B, parallel, world_size=2048)
    seconds = time.process_time() - started
    assert (report.ranks_built, report.total_parameters) == (32, DENSE_7B.parameters)
    # CPU time, because other processes on the machine are not ours to measure: 10 to 30 s, mostly
    # Megatron's groups. The bound is what a user would wait for before a job.
    assert seconds < 60


def losing(lost: Callable[[ClassifiedParameter], bool]) -> Callable[..., Any]:
    """A classify_model that forgets the parameters for which `lost` holds."""
    complete = subject.classify_model

    def classify_model(*args: Any) -> Sequence[ClassifiedParameter]:
        return [item for item in complete(*args) if not lost(item)]

    return classify_model


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (lambda item: item.ranges[0].module is Module.O, "o of layer 0: 0 elements, expected 256"),
        (lambda item: item.layer == 3, "v of layer 3: 0 elements, expected 128"),
        (
            lambda item: (
                item.ranges[0].module is Module.DOWN
                and parallel_state.get_tensor_model_parallel_rank() == 1
            ),
            "only one of TP ranks 0 and 1 holds down of layer 0",
        ),
    ],
    ids=["module", "layer", "shard"],
)
def test_what_is_lost_is_named(
    monkeypatch: pytest.MonkeyPatch, lost: Callable[[ClassifiedParameter], bool], message: str
) -> None:
    monkeypatch.setattr(subject, "classify_model", losing(lost))
    with pytest.raises(ClassificationError, match=message):
        dry_run(ModelShape(**SMALL), TP2_PP2, world_size=8)


def test_a_stage_with_the_wrong_layers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    build = subject.build_on_meta

    def build_as_first_stage(*args: Any) -> Any:
        parallel_state.set_pipeline_model_parallel_rank(0)
        try:
            return build(*args)
        finally:
            parallel_state.set_pipeline_model_parallel_rank(None)

    monkeypatch.setattr(subject, "build_on_meta", build_as_first_stage)
    with pytest.raises(ClassificationError, match="embedding: 8,192 elements, expected 4,096"):
        dry_run(ModelShape(**SMALL), TP2_PP2, world_size=4)


def fail(*_: Any) -> None:
    raise ClassificationError("on purpose")


@pytest.mark.parametrize("fails", [False, True])
def test_the_process_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    state = torch.get_rng_state()
    if fails:
        monkeypatch.setattr(subject, "classify_model", fail)
        with pytest.raises(ClassificationError, match="on purpose"):
            dry_run(ModelShape(**SMALL), TP2_PP2, world_size=4)
    else:
        dry_run(ModelShape(**SMALL), TP2_PP2, world_size=4)
    assert not dist.is_initialized()
    assert not parallel_state.model_parallel_is_initialized()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("world_size", [0, 6])
def test_a_world_that_does_not_hold_whole_replicas_is_refused(world_size: int) -> None:
    with pytest.raises(ConfigError, match=f"world_size is {world_size}.*multiple of.*= 4"):
        dry_run(ModelShape(**SMALL), TP2_PP2, world_size=world_size)


def test_a_process_with_a_world_of_its_own_is_refused() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ConfigError, match=r"torch\.distributed is initialized"):
            dry_run(ModelShape(**SMALL), TP2_PP2, world_size=4)
    finally:
        dist.destroy_process_group()
