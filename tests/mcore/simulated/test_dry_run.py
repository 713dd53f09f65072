"""The dry run accounts for every rank, notices what is lost, and leaves the process clean."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_completedp.config.cli import load_run, run_command
from megatron_completedp.config.parallel import ParallelConfig
from megatron_completedp.core.roles import Module
from megatron_completedp.errors import (
    CheckpointError,
    ClassificationError,
    CompletedPError,
    ConfigError,
)
from megatron_completedp.mcore import dry_run as dry_run_module
from megatron_completedp.mcore import optimizer, rank_builder
from megatron_completedp.mcore.classify import ClassifiedParameter
from megatron_completedp.mcore.dry_run import dry_run
from megatron_completedp.optim.segments import Segment, segments_of_shard
from megatron_completedp.plan.run_plan import Plan
from megatron_completedp.train.__main__ import TrainFlags, main
from tests.mcore.engine_runs import run_config

TARGETS = Path(__file__).parents[3] / "examples" / "targets"

TP2_PP2 = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
SHARDED = replace(TP2_PP2, use_distributed_optimizer=True, overlap_grad_reduce=True)
TP2 = replace(SHARDED, pipeline_model_parallel_size=1)


def plan_of(parallel: ParallelConfig = SHARDED, **changes: Any) -> Plan:
    """A small run in which no two modules or layers share hyperparameters."""
    training = {"precision": "bf16"} | changes.pop("training", {})
    return Plan.of(run_config(parallel, training=training, **changes))


def test_the_sample_is_a_replica_and_the_corners_of_the_last() -> None:
    plan = plan_of()
    report = dry_run(plan, world_size=16)
    # TP 2 x PP 2 at DP 0, and all four of them, corners each, at DP 3.
    assert [record.place.dp_rank for record in report.records] == [0] * 4 + [3] * 4
    assert report.total_parameters == plan.config.model.parameters
    kinds = ("weights", "param", "exp_avg", "exp_avg_sq")
    assert report.saved == dict.fromkeys(kinds, plan.config.model.parameters)
    # Written out: per rank half of two layers' matrices, their gains whole (2 of 96, 2 of 32), and
    # half of an embedding of 256 x 96; the last stage has the final norm besides.
    matrices = (96 * (128 + 64 + 64 + 128) + 3 * 160 * 96) // 2
    first_stage = 2 * (matrices + 2 * 96 + 2 * 32) + 256 * 96 // 2
    sizes = {record.elements for record in report.records}
    assert sizes == {first_stage, first_stage + 96}
    assert f"{first_stage:,} to {first_stage + 96:,} a rank" in str(report)
    assert "dry run of 16 ranks (TP 2, PP 2, DP 4), 8 of them built" in str(report)
    # bf16: weights 2, gradients 4, masters 4 and moments 8 bytes an element, the last two shared.
    for record in report.records:
        own = sum(shard.stop - shard.start for shard in record.shards[record.place.dp_rank])
        state = record.state
        assert (state.parameters, state.gradients) == (2 * record.elements, 4 * record.elements)
        assert (state.masters, state.moments) == (4 * own, 8 * own)


def test_all_ranks_builds_the_replicas_too() -> None:
    report = dry_run(plan_of(), world_size=16, all_ranks=True)
    assert [record.place.rank for record in report.records] == list(range(16))
    assert "all of them built" in str(report)


@pytest.mark.parametrize("sharded", [True, False], ids=["zero1", "replicated"])
@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"activation": "gelu"}},
        {"training": {"precision": "fp32"}},
        {"chunks": 2},
    ],
    ids=["gelu", "fp32", "interleaved"],
)
def test_variants_add_up(changes: dict[str, Any], sharded: bool) -> None:
    options = dict(changes)
    parallel = replace(
        SHARDED if sharded else TP2_PP2,
        virtual_pipeline_model_parallel_size=options.pop("chunks", None),
    )
    plan = plan_of(parallel, **options)
    report = dry_run(plan, world_size=8)
    assert report.total_parameters == plan.config.model.parameters
    first = report.records[0]
    owned = sum(shard.stop - shard.start for of in first.shards for shard in of)
    assert owned == first.elements * (1 if sharded else 2)


def test_the_command_prints_the_tables_and_the_dry_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The 7.2B target: a world that its layout does not divide is refused, with the fix."""
    layout = ["--tensor-model-parallel-size", "8", "--pipeline-model-parallel-size", "8"]
    argv = ["--config", str(TARGETS / "target_7200m.yaml"), "--dry-run", *layout]
    monkeypatch.setattr(sys, "argv", ["train", *argv, "--world-size", "2000"])
    assert run_command(main) == 2
    assert "the world size is 2000, which" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["train", *argv[:3], "--world-size", "2", *SMALL])
    assert run_command(main) == 0
    printed = capsys.readouterr().out
    assert "Adam eps" in printed
    assert "dry run of 2 ranks (TP 1, PP 1, DP 2), all of them built" in printed


#: Few enough layers to build in a moment; the rest of the 7.2B target as it is.
SMALL = ["--num-layers", "2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "built"),
    [
        (["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "4"], 8 + 4),
        (
            [
                *("--tensor-model-parallel-size", "8", "--pipeline-model-parallel-size", "4"),
                *("--virtual-pipeline-model-parallel-size", "2", "--micro-batch-size", "1"),
            ],
            32 + 4,
        ),
    ],
    ids=["tp2_pp4", "tp8_pp4_vpp2"],
)
def test_the_7b_target_on_2048_ranks(layout: list[str], built: int) -> None:
    argv = ["--config", str(TARGETS / "target_7200m.yaml"), *layout]
    config, _ = load_run(argv, prog="train", description="", extra=TrainFlags)
    report = dry_run(Plan.of(config), world_size=2048)
    assert len(report.records) == built
    assert report.total_parameters == config.model.parameters == 7_190_355_968
    # 12 ranks took 21 s and 36 ranks 44 s. The bound is what a user would wait for before a job.
    assert report.cpu_s < 120


def forgetting(lost: Callable[[ClassifiedParameter], bool]) -> Callable[..., Any]:
    """An inventory that forgets the parameters for which `lost` holds."""
    complete = rank_builder.inventory
    return lambda parameters: complete([item for item in parameters if not lost(item)])


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (
            lambda item: item.ranges[0].module is Module.O,
            "o of layer 0: 0 elements, expected 12,288",
        ),
        (lambda item: item.layer == 3, "v of layer 3: 0 elements, expected 6,144"),
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
    monkeypatch.setattr(rank_builder, "inventory", forgetting(lost))
    with pytest.raises(ClassificationError, match=message):
        dry_run(plan_of(), world_size=4)


def shifted(rows: Sequence[Segment], columns: int, start: int, stop: int) -> tuple[Segment, ...]:
    """segments_of_shard with the first boundary inside the shard one row further on."""
    segments = segments_of_shard(rows, columns, start, stop)
    if len(segments) == 1 or segments[1].length <= columns:
        return segments
    first, second, *rest = segments
    end = first.stop + columns
    return (replace(first, stop=end), replace(second, start=end), *rest)


def test_a_row_with_its_neighbour_s_hyperparameters_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(optimizer, "segments_of_shard", shifted)
    with pytest.raises(ClassificationError, match=r"of decoder\..* would train with AdamWValues"):
        dry_run(plan_of(), world_size=4)


def without_last(found: tuple[Any, ...]) -> tuple[Any, ...]:
    return found[:-1]


def last_twice(found: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*found, found[-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda by_rank: (*by_rank[:-1], without_last(by_rank[-1])), "was due|segments end at"),
        (lambda by_rank: (*by_rank[:-1], last_twice(by_rank[-1])), "was due"),
        (lambda by_rank: (by_rank[0] + by_rank[1], *by_rank[1:]), "was due"),
    ],
    ids=["left_out", "twice", "on_two_ranks"],
)
def test_an_element_without_one_optimizer_is_named(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Any], message: str
) -> None:
    cut = rank_builder._shards
    monkeypatch.setattr(rank_builder, "_shards", lambda *args: change(cut(*args)))
    with pytest.raises(ClassificationError, match=f"the optimizer's shards of .*({message})"):
        dry_run(plan_of(TP2), world_size=4)


@pytest.mark.parametrize("change", [without_last, last_twice], ids=["left_out", "twice"])
def test_an_element_not_saved_once_is_named(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Any]
) -> None:
    saved = rank_builder._saved_tensors

    def changed(*args: Any) -> Any:
        found = saved(*args)
        return change(found) if dist.get_rank() == 0 else found

    monkeypatch.setattr(rank_builder, "_saved_tensors", changed)
    with pytest.raises(CheckpointError, match=r"the checkpoint's .* expected .* each once"):
        dry_run(plan_of(), world_size=4)


@pytest.mark.parametrize("kind", ["weights", "param", "exp_avg", "exp_avg_sq"])
def test_a_kind_of_state_that_is_not_saved_is_named(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    saved = rank_builder._saved_tensors
    prefix = "" if kind == "weights" else f"optimizer.state.{kind}."

    def changed(*args: Any) -> Any:
        return tuple(
            box
            for box in saved(*args)
            if not (box.key.startswith(prefix) and (prefix or "optimizer.state" not in box.key))
        )

    monkeypatch.setattr(rank_builder, "_saved_tensors", changed)
    with pytest.raises(CheckpointError, match=f"the checkpoint's {kind} would have 0 elements"):
        dry_run(plan_of(), world_size=4)


def test_a_replica_that_differs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where one rank reads another configuration: its optimizer is shared out differently."""
    cut = rank_builder._shards

    def changed(*args: Any) -> Any:
        shards = cut(*args)
        return shards[::-1] if parallel_state.get_data_parallel_rank() == 3 else shards

    monkeypatch.setattr(rank_builder, "_shards", changed)
    monkeypatch.setattr(rank_builder, "_check_own", lambda *_: None)
    with pytest.raises(
        ClassificationError, match=r"DP 3\) are data-parallel .* their shards differ"
    ):
        dry_run(plan_of(), world_size=16)


@pytest.mark.parametrize("part", ["parameters", "gradients", "masters", "moments"])
def test_bytes_that_plan_does_not_say_are_named(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    right = dry_run_module.stage_memory

    def wrong(*args: Any) -> Any:
        memory = right(*args)
        return replace(memory, **{part: getattr(memory, part) + 2})

    monkeypatch.setattr(dry_run_module, "stage_memory", wrong)
    with pytest.raises(CompletedPError, match=f"bytes of {part}; plan's memory model says"):
        dry_run(plan_of(), world_size=4)


def fail(*_: Any, **__: Any) -> None:
    raise ClassificationError("on purpose")


@pytest.mark.parametrize("fails", [False, True])
def test_the_process_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    state, kind, group = torch.get_rng_state(), torch.Tensor.type, dist.new_group
    device = torch.cuda.current_device
    if fails:
        monkeypatch.setattr(rank_builder, "build_optimizer", fail)
        with pytest.raises(ClassificationError, match="on purpose"):
            dry_run(plan_of(), world_size=4)
    else:
        dry_run(plan_of(), world_size=4)
    assert not dist.is_initialized()
    assert not parallel_state.model_parallel_is_initialized()
    assert torch.equal(torch.get_rng_state(), state)
    assert (torch.Tensor.type, dist.new_group, torch.cuda.current_device) == (kind, group, device)


@pytest.mark.parametrize(
    ("world_size", "message"),
    [
        (0, "the world size is 0; expected at least 1 rank"),
        (6, "the world size is 6, .* = 4 does not divide; start a multiple of 4"),
        (12, "global_batch_size is 8; expected a multiple of 6"),
    ],
)
def test_a_world_that_cannot_run_the_config_is_refused(world_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dry_run(plan_of(), world_size=world_size)


def test_a_process_with_a_world_of_its_own_is_refused() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ConfigError, match=r"torch\.distributed is initialized"):
            dry_run(plan_of(), world_size=4)
    finally:
        dist.destroy_process_group()
