"""Damage to one rank of two, and a signal to one of two, in runs of the training loop.

Run by `harness`, looked at in test_policies.py. COMPLETEDP_TEST_FOLDER names a folder with the
corpus of `train_runs`; every case makes its run there.
"""

from __future__ import annotations

import hashlib
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_completedp.config.load import load_config
from megatron_completedp.data.jsonl import read_whole_rows
from megatron_completedp.errors import TrainingDiverged
from megatron_completedp.mcore.engine import Batch, Engine, StepResult
from megatron_completedp.mcore.parallel import destroy_parallel
from megatron_completedp.mcore.store import list_checkpoints
from megatron_completedp.plan.run_plan import Plan
from megatron_completedp.train.loop import RunResult
from megatron_completedp.train.start import train
from tests.dist.engine_cases import LAYOUTS
from tests.mcore.train_runs import losses, write_run

#: The step that goes wrong follows a save at once: one in the background is still being written.
STEPS, INTERVAL, BAD = 10, 3, 7

Harm = Callable[[Engine], None]


def stop_dp2() -> dict[str, Any]:
    return diverge("stop", "dp2", corrupt_gradient)


def skip_dp2() -> dict[str, Any]:
    return diverge("skip", "dp2", corrupt_gradient)


def skip_tp2() -> dict[str, Any]:
    return diverge("skip", "tp2", corrupt_gradient)


def rollback_dp2() -> dict[str, Any]:
    return diverge("rollback", "dp2", corrupt_weight)


def rollback_dp2_background() -> dict[str, Any]:
    return diverge("rollback", "dp2", corrupt_weight, asynchronous=True)


def rollback_dp2_sharded_background() -> dict[str, Any]:
    return diverge("rollback", "dp2_sharded", corrupt_weight, asynchronous=True)


def rollback_pp2_background() -> dict[str, Any]:
    return diverge("rollback", "pp2", corrupt_weight, asynchronous=True)


def undisturbed_dp2() -> dict[str, Any]:
    plan, folder = prepare("undisturbed", "dp2", {})
    train_with(plan, None)
    return {"losses": losses(folder), "evaluations": losses(folder, "eval")}


def signal_dp2_background() -> dict[str, Any]:
    """Rank 1 is signalled in the step after a save that may still be under way."""
    plan, folder = prepare("signal", "dp2", {"checkpoint__asynchronous": True})
    first, _ = train_with(plan, lambda engine: os.kill(os.getpid(), signal.SIGUSR1))
    left = [path.name for path in list_checkpoints(folder / "checkpoints")]
    asked = (folder / "requeue").exists()
    dist.barrier()
    second, _ = train_with(plan, None)
    return {
        "stopped": (first.stopped, first.steps, asked),
        "checkpoints": left,
        "finished": (second.stopped, second.steps),
        "losses": losses(folder),
        "evaluations": losses(folder, "eval"),
    }


def diverge(policy: str, layout: str, harm: Harm, *, asynchronous: bool = False) -> dict[str, Any]:
    """What became of a run whose rank 1 alone is harmed before step BAD."""
    name = f"{policy}_{layout}_{asynchronous}"
    changes = {
        "divergence": {"on_nonfinite": policy},
        "checkpoint__asynchronous": asynchronous,
    }
    plan, folder = prepare(name, layout, changes)
    outcome: dict[str, Any] = {}
    try:
        result, outcome["weights"] = train_with(plan, harm)
        outcome["steps"] = result.steps
        outcome["finite"] = math.isfinite(result.train_loss)
    except TrainingDiverged as error:
        outcome["error"] = str(error)
    dist.barrier()  # rank 0 has closed its files
    rows = read_whole_rows(folder / "metrics.jsonl")
    outcome["events"] = [row for row in rows if row["kind"] == "event"]
    outcome["losses"] = losses(folder)
    outcome["checkpoints"] = [path.name for path in list_checkpoints(folder / "checkpoints")]
    return outcome


def prepare(name: str, layout: str, changes: dict[str, Any]) -> tuple[Plan, Path]:
    shared = Path(os.environ["COMPLETEDP_TEST_FOLDER"])
    folder = shared / name
    if dist.get_rank() == 0:
        changes = {
            "parallel": LAYOUTS[layout],
            "training__train_steps": STEPS,
            "evaluation__interval": STEPS,
            "checkpoint__interval": INTERVAL,
            "checkpoint__keep_last": 100,
            **changes,
        }
        write_run(folder, shared / "corpus", **changes)
    dist.barrier()
    return Plan.of(load_config(folder.with_suffix(".yaml"))), folder


def train_with(plan: Plan, harm: Harm | None) -> tuple[RunResult, str]:
    """Train; `harm` is done on rank 1 before step BAD. Also a hash of this rank's weights."""
    engines: list[Engine] = []
    step = Engine.train_step

    def harmed(engine: Engine, given: list[Batch], **limits: float) -> StepResult:
        engines.append(engine)
        if harm and dist.get_rank() == 1 and engine.step + 1 == BAD:
            harm(engine)
        return step(engine, given, **limits)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Engine, "train_step", harmed)
            result = train(plan)
        digest = hashlib.sha256()
        for item in engines[-1].parameters:
            digest.update(item.parameter.detach().numpy().tobytes())
        return result, digest.hexdigest()
    finally:
        destroy_parallel(keep_process_group=True)


def corrupt_weight(engine: Engine) -> None:
    """As a memory error leaves it: the loss of this rank is NaN from now on."""
    with torch.no_grad():
        engine.parameters[-1].parameter.view(-1)[0] = math.nan


def corrupt_gradient(engine: Engine) -> None:
    """One element is inf after the reduction, so that no other rank has seen it."""
    compute = engine._run

    def compute_and_corrupt(given: list[Batch], *, forward_only: bool) -> float:
        engine._run = compute  # type: ignore[method-assign]
        loss = compute(given, forward_only=forward_only)
        engine.parameters[-1].parameter.main_grad.view(-1)[0] = math.inf
        time.sleep(0.2)  # a rank that went on alone would be in its next step by now
        return loss

    engine._run = compute_and_corrupt  # type: ignore[method-assign,assignment]
