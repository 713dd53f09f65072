"""Time of a training step against a plain PyTorch GPT of the same architecture.

    python -m tests.bench.train_step [--rounds 15]

About 10M parameters (6 layers, hidden 320, 4k vocabulary), 8 sequences of 128 tokens, fp32, one
thread. A step is forward, backward and AdamW. Both sides alternate in one process, so that a slow
moment of the machine hits both, and medians are compared. The plain side is tests/oracle.py with
torch.optim.AdamW(fused=True). The last line is one JSON object: ratio = ours / plain.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from megatron_completedp.config.parallel import ParallelConfig
from megatron_completedp.core.hyperparams import ResidualMultiplier
from megatron_completedp.core.shape import ModelShape
from megatron_completedp.mcore.model import build_model
from megatron_completedp.mcore.parallel import destroy_parallel, initialize_parallel
from megatron_completedp.mcore.platform import detect_platform
from tests.oracle import PlainGPT, megatron_weights

SHAPE = ModelShape(
    num_layers=6,
    hidden_size=320,
    ffn_hidden_size=864,
    num_attention_heads=5,
    head_dim=64,
    vocab_size=4000,
    seq_length=128,
)
SEQUENCES = 8
Z_LOSS = 1e-4
RESIDUAL = [ResidualMultiplier(layer=layer, attention=0.5, mlp=0.5) for layer in range(6)]

Step = Callable[[], float]


def plain_step(tokens: Tensor, labels: Tensor) -> Step:
    """The reference: PlainGPT and torch's fused AdamW."""
    model = PlainGPT(SHAPE, RESIDUAL, z_loss=Z_LOSS)
    model.load_from_megatron(megatron_weights(SHAPE))
    return step_of(model, lambda: model(tokens, labels)[0])


def megatron_step(tokens: Tensor, labels: Tensor) -> Step:
    """The same step on the Megatron model."""
    (model,) = build_model(
        SHAPE,
        ParallelConfig(),
        platform=detect_platform("cpu"),
        precision="fp32",
        residual=RESIDUAL,
        z_loss=Z_LOSS,
    )
    model.load_state_dict(megatron_weights(SHAPE), strict=False)
    return step_of(
        model,
        lambda: model(tokens, position_ids=None, attention_mask=None, labels=labels).mean(),
    )


def step_of(model: nn.Module, forward: Callable[[], Tensor]) -> Step:
    """Forward, backward and a fused AdamW update."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> float:
        optimizer.zero_grad()
        loss = forward()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each side")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # Megatron's own deprecations
    initialize_parallel(detect_platform("cpu"), ParallelConfig(), timeout_s=60, seed=0)
    ids = torch.randint(SHAPE.vocab_size, (SEQUENCES, SHAPE.seq_length + 1))
    batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    steps = {"plain": plain_step(*batch), "megatron": megatron_step(*batch)}

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
    assert abs(losses["megatron"] / losses["plain"] - 1) < 1e-3, losses
    medians = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    print(
        f"{SHAPE.parameters / 1e6:.1f}M parameters, {SEQUENCES} x {SHAPE.seq_length} tokens, fp32"
    )
    for name, values in times.items():
        print(f"{name:>9}: {medians[name]:8.1f} ms  (fastest {1e3 * min(values):.1f} ms)")
    figures = {f"{name}_ms": round(value, 2) for name, value in medians.items()}
    print(json.dumps({"ratio": round(medians["megatron"] / medians["plain"], 4), **figures}))


if __name__ == "__main__":
    main()
