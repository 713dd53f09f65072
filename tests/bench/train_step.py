"""Time of a whole training step against a plain PyTorch GPT of the same architecture.

    python tests/bench/train_step.py [--rounds 15]

About 10M parameters (6 layers, hidden 320, 4k vocabulary), 8 sequences of 128 tokens, fp32, one
thread. A step is forward, backward, gradient clipping, AdamW and the schedule: ours through
`Engine.train_step` as in training, the plain side through tests/oracle.py, torch's clip_grad_norm_
and torch.optim.AdamW(fused=True). Both alternate in one process, so that a slow moment of the
machine hits both, and medians are compared. The last line is one JSON object: ratio = ours / plain.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))  # the oracle lives beside the tests

import torch
from megatron.core.utils import unwrap_model

from megatron_completedp.config.parallel import ParallelConfig
from megatron_completedp.config.run import RunConfig
from megatron_completedp.config.sections import TrainingConfig
from megatron_completedp.core.hyperparams import BaseHyperparams
from megatron_completedp.core.schedule import Schedule
from megatron_completedp.core.shape import ModelShape
from megatron_completedp.mcore.engine import Batch, Engine
from megatron_completedp.mcore.parallel import destroy_parallel, initialize_parallel
from megatron_completedp.mcore.platform import CpuPlatform
from megatron_completedp.plan.run_plan import Plan
from tests.oracle import PlainGPT

SEQUENCES = 8
CONFIG = RunConfig(
    run_dir="unused",
    hyperparams=BaseHyperparams(lr=1e-3),
    model=ModelShape(
        num_layers=6,
        hidden_size=320,
        ffn_hidden_size=864,
        num_attention_heads=5,
        head_dim=64,
        vocab_size=4000,
        seq_length=128,
    ),
    schedule=Schedule(kind="constant", warmup_fraction=0.0),
    training=TrainingConfig(
        global_batch_size=SEQUENCES, micro_batch_size=SEQUENCES, train_steps=1000, device="cpu"
    ),
)

Step = Callable[[], float]


def engine_step(engine: Engine, batch: Batch) -> Step:
    """A step as training does it."""
    return lambda: engine.train_step([batch]).loss


def plain_step(engine: Engine, plan: Plan, batch: Batch) -> Step:
    """The same step in plain torch, from the engine's weights."""
    model = PlainGPT(CONFIG.model, plan.resolved.residual, z_loss=CONFIG.training.z_loss)
    (megatron,) = unwrap_model(engine.chunks)
    model.load_from_megatron(dict(megatron.named_parameters()))
    hp = CONFIG.hyperparams
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1]},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=hp.lr,
        weight_decay=hp.weight_decay,
        betas=(hp.beta1, hp.beta2),
        eps=hp.eps,
        fused=True,
    )

    def step() -> float:
        optimizer.zero_grad()
        loss, cross_entropy = model(batch["tokens"], batch["labels"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CONFIG.training.clip_grad)
        optimizer.step()
        return cross_entropy.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each side")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # Megatron's own deprecations
    platform = CpuPlatform()
    initialize_parallel(platform, ParallelConfig(), timeout_s=60, seed=0)
    ids = torch.randint(CONFIG.model.vocab_size, (SEQUENCES, CONFIG.model.seq_length + 1))
    batch = {"tokens": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}
    plan = Plan.of(CONFIG)
    engine = Engine(CONFIG, plan.resolved, platform)
    steps = {"plain": plain_step(engine, plan, batch), "engine": engine_step(engine, batch)}

    times: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, float] = {}
    for round_number in range(rounds + 2):
        for name, step in steps.items():
            started = time.perf_counter()
            losses[name] = step()
            if round_number >= 2:  # the first steps allocate
                times[name].append(time.perf_counter() - started)
    destroy_parallel()

    # The two sides did the same work, or the comparison says nothing.
    assert abs(losses["engine"] / losses["plain"] - 1) < 1e-3, losses
    medians = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    print(
        f"{CONFIG.model.parameters / 1e6:.1f}M parameters, {SEQUENCES} x "
        f"{CONFIG.model.seq_length} tokens, fp32"
    )
    for name, values in times.items():
        print(f"{name:>7}: {medians[name]:8.1f} ms  (fastest {1e3 * min(values):.1f} ms)")
    figures = {f"{name}_ms": round(value, 2) for name, value in medians.items()}
    print(json.dumps({"ratio": round(medians["engine"] / medians["plain"], 4), **figures}))


if __name__ == "__main__":
    main()
