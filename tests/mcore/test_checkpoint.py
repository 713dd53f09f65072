"""Damaged checkpoints, moved hyperparameters and full disks, in one process and by the command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig

from megatron_completedp.config.parallel import ParallelConfig
from megatron_completedp.config.run import RunConfig
from megatron_completedp.config.sections import CheckpointConfig
from megatron_completedp.core.hyperparams import Resolved
from megatron_completedp.core.multipliers import ModuleMultipliers, Multipliers
from megatron_completedp.core.roles import Module
from megatron_completedp.errors import CheckpointError
from megatron_completedp.mcore import data_parallel, sharded_state
from megatron_completedp.mcore.checkpoint import Saver, resume
from megatron_completedp.mcore.checkpoint_info import read_info, read_table
from megatron_completedp.mcore.engine import Engine
from megatron_completedp.mcore.manifest import verify
from megatron_completedp.mcore.optimizer import check_live_values, optimizer_parts
from megatron_completedp.mcore.platform import Platform
from megatron_completedp.mcore.store import checkpoint_path, list_checkpoints
from megatron_completedp.plan.run_plan import Plan
from tests.mcore.damage import delete, flip, forge_table, truncate
from tests.mcore.engine_runs import batches, run_config

Damage = Callable[[Path], object]


def engine_of(config: RunConfig, platform: Platform) -> Engine:
    return Engine(config, Plan.of(config).resolved, platform)


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return run_config()


@pytest.fixture(scope="module")
def engine(config: RunConfig, platform: Platform) -> Engine:
    """One engine for tests that load into it or read it; what it holds does not matter."""
    return engine_of(config, platform)


@pytest.fixture(scope="module")
def saved(config: RunConfig, platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints after steps 1 and 2. Tests that spoil them take a copy."""
    folder = tmp_path_factory.mktemp("saved")
    engine = engine_of(config, platform)
    saver = Saver(engine, folder, CheckpointConfig(), config_hash="test")
    for step in range(2):
        engine.train_step(batches(config, step))
        saver.save()
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


DAMAGES: dict[str, tuple[Damage, str]] = {
    "truncated": (truncate, "bytes; expected"),
    "flipped": (flip, "has SHA-256"),
    "deleted": (delete, "is missing"),
    "forged": (forge_table, "hyperparams.json has SHA-256"),
}


def test_a_checkpoint_says_what_it_is(config: RunConfig, engine: Engine, saved: Path) -> None:
    path = checkpoint_path(saved, 2)
    verify(path)
    info = read_info(path)
    assert (info.step, info.samples) == (2, 2 * config.training.global_batch_size)
    assert info.layout == "TP1 x PP1 x VPP1 on 1 ranks"
    assert info.resolved_sha256 == engine.resolved.sha256
    assert read_table(path) == json.loads(json.dumps(engine.resolved.as_json()))
    assert (path / "config.yaml").read_text().startswith("run_dir: ")
    assert info.commit is None or len(info.commit.removesuffix("-dirty")) == 40
    assert (saved / "latest").read_text() == "step_00000002\n"


def test_an_untouched_one_is_resumed_without_a_word(engine: Engine, copy: Path) -> None:
    found = resume(engine, copy)
    assert (found.path, found.notes) == (checkpoint_path(copy, 2), ())
    assert engine.step == 2


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_seen_and_the_one_before_is_used(damage: str, engine: Engine, copy: Path) -> None:
    spoil, what = DAMAGES[damage]
    spoil(checkpoint_path(copy, 2))
    found = resume(engine, copy)
    assert found.path == checkpoint_path(copy, 1)
    assert engine.step == 1
    (note,) = found.notes
    assert note.startswith("skipped step_00000002: ")
    assert what in note
    # And when there is none before it:
    spoil(checkpoint_path(copy, 1))
    engine.move_to(7)
    with pytest.raises(
        CheckpointError, match=r"none of the 2 checkpoints in .* is whole"
    ) as caught:
        resume(engine, copy)
    assert str(caught.value).count(what) == 2
    assert engine.step == 7, "nothing was loaded"


@pytest.mark.parametrize("pointer", [b"", b"step_00000009\n"], ids=["empty", "nowhere"])
def test_a_wrong_pointer_costs_a_note(pointer: bytes, engine: Engine, copy: Path) -> None:
    (copy / "latest").write_bytes(pointer)
    (copy / ".writing_0123").mkdir()
    found = resume(engine, copy)
    assert found.path == checkpoint_path(copy, 2)
    assert len(found.notes) == 1
    assert "the folder's listing is used" in found.notes[0]
    assert not (copy / ".writing_0123").exists()


SHARDED = ParallelConfig(
    use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True
)


@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "megatron"])
def test_a_buffer_in_several_buckets_comes_back_bit_for_bit(
    fixed: bool, platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masters and moments behind a bucket's padding; without our offsets they are a neighbour's."""
    config = run_config(SHARDED, training={"precision": "bf16"})
    one_each = partial(DistributedDataParallelConfig, bucket_size=1)  # 40M elements by default
    monkeypatch.setattr(data_parallel, "DistributedDataParallelConfig", one_each)
    if not fixed:
        monkeypatch.setattr(sharded_state, "offsets_without_padding", nullcontext)
    engine = engine_of(config, platform)
    (buffer,) = engine.chunks[0].buffers
    assert any(bucket.numel_unpadded % 128 for bucket in buffer.buckets[:-1]), "nothing is padded"
    engine.train_step(batches(config, 0))
    Saver(engine, tmp_path, CheckpointConfig(), config_hash="test").save()
    loaded = engine_of(config, platform)
    assert resume(loaded, tmp_path).path is not None
    saved, found = optimizer_state(engine), optimizer_state(loaded)
    equal = [torch.equal(one, other) for one, other in zip(saved, found, strict=True)]
    assert all(equal) if fixed else not all(equal)


def optimizer_state(engine: Engine) -> list[torch.Tensor]:
    """Masters and both moments of each parameter."""
    (part,) = optimizer_parts(engine.optimizer)
    adamw = part.optimizer
    return [
        tensor
        for master in adamw.param_groups[0]["params"]
        for tensor in (master, adamw.state[master]["exp_avg"], adamw.state[master]["exp_avg_sq"])
    ]


def test_no_folder_and_an_empty_one_are_fresh_starts(engine: Engine, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        assert resume(engine, folder).path is None


def test_a_checkpoint_beyond_the_resumed_step_does_not_push_out_the_new_one(
    config: RunConfig, engine: Engine, copy: Path
) -> None:
    shutil.copytree(checkpoint_path(copy, 2), checkpoint_path(copy, 5))
    flip(checkpoint_path(copy, 5))
    flip(checkpoint_path(copy, 2))
    resume(engine, copy)
    engine.train_step(batches(config, 1))
    Saver(engine, copy, CheckpointConfig(keep_last=1), config_hash="test").save()
    assert [path.name for path in list_checkpoints(copy)] == ["step_00000002", "step_00000005"]
    verify(checkpoint_path(copy, 2))
    assert resume(engine, copy).path == checkpoint_path(copy, 2)


def with_q(config: RunConfig, **factors: float) -> RunConfig:
    """`config` with other hyperparameters for q alone."""
    multipliers = config.multipliers
    q = replace(multipliers.types.get(Module.Q, ModuleMultipliers()), **factors)
    types = {**multipliers.types, Module.Q: q}
    return replace(config, multipliers=replace(multipliers, types=types))


CHANGED = {"lr_mult": 3.0, "eps_mult": 5.0}


@pytest.mark.parametrize(
    ("allowed", "refused"),
    [
        ([], ["q.lr", "q.eps"]),
        (["q.lr"], ["q.eps"]),
        (["*.eps", "k.lr"], ["q.lr"]),
        (["q.lr", "q.eps"], []),
        (["*.lr", "*.eps"], []),
    ],
    ids=["none", "one", "other", "both", "every"],
)
def test_moved_hyperparameters_need_their_names(
    allowed: list[str],
    refused: list[str],
    config: RunConfig,
    platform: Platform,
    saved: Path,
) -> None:
    engine = engine_of(with_q(config, **CHANGED), platform)
    if refused:
        with pytest.raises(CheckpointError) as caught:
            resume(engine, saved, allowed=allowed)
        message = str(caught.value)
        assert message.startswith(f"{checkpoint_path(saved, 2)}: the checkpoint was written with")
        flags = " ".join(f"--allow-hp-change {name}" for name in refused)
        assert message.endswith(f"or name each change: {flags}")
        assert engine.step == 0
        return
    (note,) = resume(engine, saved, allowed=allowed).notes
    assert note.startswith("hyperparameters changed on request:\nmodule")
    check_live_values(engine.optimizer, engine.groups, engine.config.schedule)
    planned: Resolved = engine.resolved
    lr = planned.get(Module.Q, 0).lr
    assert any(values.lr == lr for values in live_table(engine)), "the new value is in force"


def live_table(engine: Engine) -> Any:
    (part,) = getattr(engine.optimizer, "chained_optimizers", [engine.optimizer])
    return part.optimizer.table


def test_another_batch_size_is_refused(config: RunConfig, platform: Platform, saved: Path) -> None:
    training = replace(config.training, global_batch_size=4)
    changes = {"training": training, "base": None, "multipliers": Multipliers()}
    other = engine_of(replace(config, **changes), platform)
    with pytest.raises(CheckpointError, match=r"has seen 16 sequences in 2 steps; .* would be 8"):
        resume(other, saved)
