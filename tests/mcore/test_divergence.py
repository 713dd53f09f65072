"""NaN and spikes in real runs: what each policy leaves in weights, metrics and checkpoints."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.utils import unwrap_model

from megatron_completedp.config.load import load_config
from megatron_completedp.config.parallel import ParallelConfig
from megatron_completedp.data.jsonl import read_whole_rows
from megatron_completedp.errors import TrainingDiverged
from megatron_completedp.mcore.checkpoint import load_checkpoint
from megatron_completedp.mcore.engine import Batch, Engine, StepResult
from megatron_completedp.mcore.parallel import destroy_parallel
from megatron_completedp.mcore.platform import CpuPlatform
from megatron_completedp.plan.run_plan import Plan
from megatron_completedp.train.loop import RunResult
from megatron_completedp.train.metrics import Row
from megatron_completedp.train.start import train
from tests.mcore.engine_runs import batches, run_config
from tests.mcore.train_runs import STEPS, losses, make_corpus, write_run

#: Steps between checkpoints, and the step (counted from 1) that goes wrong: two were lost by then.
INTERVAL, BAD = 4, 11

Harm = Callable[[Engine, list[Batch]], None]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def run(
    folder: Path,
    corpus: Path,
    divergence: dict[str, Any],
    steps: dict[int, Harm] | None = None,
    *,
    asynchronous: bool = False,
) -> RunResult:
    """Train in this process; `steps` are harmed before they are taken."""
    config = write_run(
        folder,
        corpus,
        divergence=divergence,
        checkpoint={"interval": INTERVAL, "keep_last": 100, "asynchronous": asynchronous},
        evaluation={"interval": STEPS, "samples": 8},
    )
    destroy_parallel(keep_process_group=True)  # a new process has no groups
    step = Engine.train_step

    def harmed(engine: Engine, given: list[Batch], **limits: float) -> StepResult:
        if steps and engine.step + 1 in steps:
            steps[engine.step + 1](engine, given)
        return step(engine, given, **limits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "train_step", harmed)
        return train(Plan.of(load_config(config)))


def weights_of(engine: Engine) -> dict[str, torch.Tensor]:
    (model,) = unwrap_model(engine.chunks)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def saved_weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    plan = Plan.of(load_config(folder / "config.yaml"))
    engine = Engine(plan.config, plan.resolved, CpuPlatform())
    load_checkpoint(engine, checkpoint(folder, step))
    assert engine.step == step
    return weights_of(engine)


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step_{step:08d}"


def events(folder: Path) -> list[Row]:
    rows = read_whole_rows(folder / "metrics.jsonl")
    return [row for row in rows if row["kind"] == "event" and row["what"] != "resume"]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def corrupt_weight(engine: Engine, given: list[Batch]) -> None:
    """As a memory error leaves it: the loss is NaN, and no skipping mends the weight."""
    (model,) = unwrap_model(engine.chunks)
    with torch.no_grad():
        model.decoder.layers[1].mlp.linear_fc2.weight[0, 0] = math.nan


def corrupt_gradient(engine: Engine, given: list[Batch]) -> None:
    """One element of one gradient is inf after a real backward pass; the loss is finite."""
    compute = engine._run

    def compute_and_corrupt(given: list[Batch], *, forward_only: bool) -> float:
        engine._run = compute  # type: ignore[method-assign]
        loss = compute(given, forward_only=forward_only)
        (model,) = unwrap_model(engine.chunks)
        model.decoder.layers[1].mlp.linear_fc2.weight.main_grad[0, 0] = math.inf
        return loss

    engine._run = compute_and_corrupt  # type: ignore[method-assign,assignment]


def garble_text(engine: Engine, given: list[Batch]) -> None:
    """Random tokens instead of text: a batch far harder than the others."""
    generator = torch.Generator().manual_seed(0)
    for batch in given:
        for name in ("tokens", "labels"):
            batch[name] = torch.randint(512, batch[name].shape, generator=generator)


def inflate_weights(engine: Engine, given: list[Batch]) -> None:
    """What an absurd update leaves: a finite loss, far too high from now on."""
    (model,) = unwrap_model(engine.chunks)
    with torch.no_grad():
        model.output_layer.weight.mul_(30.0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training": {"precision": "bf16"}},
        {"parallel": {"use_distributed_optimizer": True}},
        {
            "parallel": {
                "use_distributed_optimizer": True,
                "overlap_grad_reduce": True,
                "overlap_param_gather": True,
            },
            "training": {"precision": "bf16"},
        },
    ],
    ids=["fp32", "bf16", "sharded", "bf16_sharded_overlap"],
)
def test_a_refused_update_moves_nothing(changes: dict[str, Any]) -> None:
    """Weights stay bit-equal; what follows shows that moments and step counts stayed, too."""
    parallel = ParallelConfig(**changes.get("parallel", {}))
    config = run_config(parallel, training=changes.get("training", {}))
    refused, plain = (Engine(config, Plan.of(config).resolved, CpuPlatform()) for _ in range(2))
    for engine in (refused, plain):
        for step in range(3):
            engine.train_step(batches(config, step))
    before = weights_of(refused)
    corrupt_gradient(refused, [])
    with pytest.raises(TrainingDiverged) as caught:
        refused.train_step(batches(config, 3))
    assert caught.value.cause == "nonfinite"
    assert caught.value.groups == ("down [1]",)
    with pytest.raises(TrainingDiverged, match=r"step 4: the loss is .*, a spike above 0.1000"):
        refused.train_step(batches(config, 3), loss_limit=0.1)
    assert equal(weights_of(refused), before)
    assert refused.train_step(batches(config, 3)) == plain.train_step(batches(config, 3))
    after = weights_of(plain)
    assert equal(weights_of(refused), after)
    assert not equal(after, before), "a step does move weights, or the test sees nothing"


def test_stop_names_step_group_and_checkpoint(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(TrainingDiverged) as caught:
        run(folder, corpus, {}, {BAD: corrupt_gradient})
    message = str(caught.value)
    assert message.startswith(f"step {BAD}: the gradient norm is inf at a loss of ")
    assert "Groups with non-finite gradients: " in message
    assert message.endswith(f"The last good checkpoint is {checkpoint(folder, 8)}.")
    (event,) = events(folder)
    assert event["step"] == BAD
    assert (event["what"], event["policy"]) == ("nonfinite", "stop")
    assert len(event["groups"]) == 1
    assert event["message"] == message
    # Another policy may take up the stopped run, which an unharmed machine then finishes.
    assert run(folder, corpus, {"on_nonfinite": "skip"}).steps == STEPS
    assert events(folder) == []


def test_skip_leaves_one_update_out(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = run(folder, corpus, {"on_nonfinite": "skip"}, {BAD: corrupt_gradient})
    assert result.steps == STEPS
    (event,) = events(folder)
    assert (event["step"], event["what"], event["policy"]) == (BAD, "nonfinite", "skip")
    assert event["message"].endswith("Skipped the update (1 of at most 20).")
    # Data and schedule moved on: no step is repeated, and the rate is that of the step's number.
    rows = [row for row in read_whole_rows(folder / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["step"] for row in rows] == [s for s in range(1, STEPS + 1) if s != BAD]
    schedule = load_config(folder / "config.yaml").schedule
    assert [row["lr_fraction"] for row in rows] == [
        schedule.at(row["step"] - 1, STEPS) for row in rows
    ]


def test_a_policy_that_cannot_help_ends(corpus: Path, tmp_path: Path) -> None:
    """Every step after a corrupt weight is NaN; skipping all of them would look like training."""
    folder = tmp_path / "run"
    policy = {"on_nonfinite": "skip", "max_events": 3}
    with pytest.raises(TrainingDiverged, match=r"used up its divergence.max_events = 3 skips"):
        run(folder, corpus, policy, {BAD: corrupt_weight})
    assert [(row["step"], row["policy"]) for row in events(folder)] == [
        (BAD, "skip"),
        (BAD + 1, "skip"),
        (BAD + 2, "skip"),
        (BAD + 3, "stop"),
    ]
    assert not checkpoint(folder, 12).exists(), "it would have had the corrupt weight"


@pytest.mark.parametrize("asynchronous", [False, True], ids=["foreground", "background"])
def test_rollback_restores_and_survives_a_restart(
    corpus: Path, tmp_path: Path, asynchronous: bool
) -> None:
    folder, policy = tmp_path / "run", {"on_nonfinite": "rollback"}
    result = run(folder, corpus, policy, {BAD: corrupt_weight}, asynchronous=asynchronous)
    assert result.steps == STEPS
    assert math.isfinite(result.train_loss)
    (event,) = events(folder)
    assert (event["step"], event["what"], event["policy"]) == (BAD, "nonfinite", "rollback")
    assert f"Weights and moments are those of {checkpoint(folder, 8)}" in event["message"]
    # Saved at once under the step it goes on from, with the weights it went back to.
    assert equal(saved_weights(folder, BAD), saved_weights(folder, 8))
    assert not equal(saved_weights(folder, 12), saved_weights(folder, 8))
    # A restart from there goes on past what was left out, and ends with the same bits.
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    for step in (12, 16, 20):
        shutil.rmtree(checkpoint(again, step))
    run(again, corpus, policy, asynchronous=asynchronous)
    assert losses(again) == losses(folder)
    assert events(again) == events(folder)
    assert equal(saved_weights(again, STEPS), saved_weights(folder, STEPS))


def test_rollback_without_a_checkpoint_stops(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged, match=r"no checkpoint to roll back to\. No checkpoint"):
        run(tmp_path / "run", corpus, {"on_nonfinite": "rollback"}, {2: corrupt_weight})


#: The tiny run falls by 0.1 nats per step; garbled text and inflated weights cost more than 0.7.
SPIKES = {"spike_nats": 0.7, "spike_window": 5}


@pytest.mark.parametrize("policy", ["ignore", "stop", "skip", "rollback"])
def test_spikes(corpus: Path, tmp_path: Path, policy: str) -> None:
    folder = tmp_path / "run"
    config = {"on_spike": policy, **SPIKES}
    harm = {BAD: inflate_weights if policy == "rollback" else garble_text}
    if policy == "stop":
        with pytest.raises(TrainingDiverged, match=rf"step {BAD}: the loss is .*, a spike above"):
            run(folder, corpus, config, harm)
    else:
        assert run(folder, corpus, config, harm).steps == STEPS
    expected = [] if policy == "ignore" else [(BAD, "spike", policy)]
    assert [(row["step"], row["what"], row["policy"]) for row in events(folder)] == expected
    steps = [step for step, _ in losses(folder)]
    assert (BAD in steps) == (policy == "ignore")


def test_a_restart_judges_spikes_as_the_run_would_have(corpus: Path, tmp_path: Path) -> None:
    """The window is saved: without it the restart, 2 losses after its checkpoint, sees no spike."""
    folder, config = tmp_path / "run", {"on_spike": "skip", **SPIKES}
    with pytest.raises(TrainingDiverged):
        run(folder, corpus, {**config, "on_spike": "stop"}, {BAD: garble_text})
    run(folder, corpus, config, {BAD: garble_text})
    assert [(row["step"], row["policy"]) for row in events(folder)] == [(BAD, "skip")]
