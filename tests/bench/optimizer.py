"""Time of an optimizer step with hyperparameters for each module of each layer, against one set.

    python tests/bench/optimizer.py [--rounds 40] [--size 50M] [--device cpu]

Three AdamWs work in turn on the same weights, gradients and moments, so that neither the machine's
slow moments nor the place of the memory favours one:

* plain: torch.optim.AdamW(fused=True), all tensors in one group with one set of values;
* per module: PerModuleAdamW, every row range of 14 modules x layers with its own set, q, k and v
  interleaved by query group in one weight, gate and up in another;
* naive: torch.optim.AdamW(fused=True) with one group for each of these sets, over views.

One thread on CPU. A copy of a tensor as large as the weights runs beside them, for its bandwidth.
The last line is one JSON object: ratio = per module / plain and naive_ratio = naive / plain, each
the median over the rounds of the ratio within a round, so that a machine that slows down for a
while slows both. Times are the process's own CPU seconds on CPU, which leave out other processes'
turns but not what these do to the caches, and wall seconds on a GPU; wall_ratio is of wall seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))  # the tensors lie beside the tests

import torch

from megatron_completedp.optim.per_module import PerModuleAdamW
from tests.optim.transformer import ShapedSegments, Transformer, random_values, set_count

SIZES = {
    "50M": Transformer(
        layers=12, hidden=512, ffn=1408, groups=4, queries=2, head_dim=64, vocab=14_000
    ),
    "1.3B": Transformer(
        layers=24, hidden=2048, ffn=5632, groups=8, queries=2, head_dim=128, vocab=32_000
    ),
}
#: Float32 traffic for each weight: AdamW reads weight, gradient and two moments and writes all but
#: the gradient; a copy reads and writes once.
ADAMW_BYTES, COPY_BYTES = 28, 8

Step = Callable[[], object]


def optimizers(tensors: list[ShapedSegments], device: torch.device) -> dict[str, Step]:
    """The three steps over shared tensors."""
    segments = [of for _, of in tensors]
    params = [torch.randn(shape, device=device) for shape, _ in tensors]
    for param in params:
        param.grad = 1e-3 * torch.randn_like(param)
    moments = [(torch.zeros_like(param), torch.zeros_like(param)) for param in params]
    table = random_values(set_count(segments))

    plain = torch.optim.AdamW(params, lr=1e-3, fused=True)
    ours = PerModuleAdamW(params)
    ours.assign(table, dict(zip(params, segments, strict=True)))
    groups: list[dict[str, object]] = [
        {"params": [], "lr": v.lr, "weight_decay": v.weight_decay, "eps": v.eps}
        | {"betas": (v.beta1, v.beta2)}
        for v in table
    ]
    naive_state = {}
    for param, (exp_avg, exp_avg_sq), of in zip(params, moments, segments, strict=True):
        plain.state[param] = _torch_state(exp_avg, exp_avg_sq)
        ours.state[param] = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        for segment in of:
            part, grad, first, second = (
                tensor.view(-1)[segment.start : segment.stop]
                for tensor in (param, param.grad, exp_avg, exp_avg_sq)
            )
            part.grad = grad
            groups[segment.values]["params"].append(part)  # type: ignore[attr-defined]
            naive_state[part] = _torch_state(first, second)
    naive = torch.optim.AdamW(groups, fused=True)  # type: ignore[arg-type]
    naive.state.update(naive_state)
    return {"plain": plain.step, "per module": ours.step, "naive": naive.step}


def _torch_state(exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor) -> dict[str, torch.Tensor]:
    step = torch.zeros((), device=exp_avg.device)
    return {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


def seconds(step: Step, device: torch.device) -> tuple[float, float]:
    """(the time to compare, wall time) of one call; the module says which time is compared."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
    started, cpu_started = time.perf_counter(), time.process_time()
    step()
    if on_gpu:
        torch.cuda.synchronize(device)
    wall, cpu = time.perf_counter() - started, time.process_time() - cpu_started
    return (wall if on_gpu else cpu), wall


def measure(
    steps: dict[str, Step], rounds: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """The times to compare and the wall times of every step, in its turn in each round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    walls: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for round_number in range(rounds + 2):
        for name in order:
            taken, wall = seconds(steps[name], device)
            if round_number >= 2:  # the first steps build views or compile
                times[name].append(taken)
                walls[name].append(wall)
        order = order[1:] + order[:1]  # so that none always follows the same one
    return times, walls


def paired(times: dict[str, list[float]], name: str) -> float:
    """Median over the rounds of `name`'s time over the plain optimizer's."""
    return statistics.median(
        mine / plain for mine, plain in zip(times[name], times["plain"], strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40, help="timed steps of each optimizer")
    parser.add_argument("--size", choices=SIZES, default="50M")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tensors = SIZES[args.size].tensors()
    segments = [of for _, of in tensors]
    weights = sum(torch.Size(shape).numel() for shape, _ in tensors)
    steps = optimizers(tensors, device)
    source = torch.ones(weights, device=device)
    target = torch.empty_like(source)
    steps["copy"] = lambda: target.copy_(source)

    times, walls = measure(steps, args.rounds, device)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    minima = {name: min(taken) for name, taken in times.items()}
    print(f"{weights:,} weights in {set_count(segments)} sets on {device}, float32")
    print("              median ms   min ms   GB/s at min")
    for name, least in minima.items():
        rate = weights * (COPY_BYTES if name == "copy" else ADAMW_BYTES) / least / 1e9
        print(f"{name:11}  {1e3 * medians[name]:10.2f}  {1e3 * least:7.2f}  {rate:12.1f}")
    figures = {
        "ratio": paired(times, "per module"),
        "naive_ratio": paired(times, "naive"),
        "wall_ratio": paired(walls, "per module"),
        "ratio_of_minima": minima["per module"] / minima["plain"],
    }
    print(json.dumps({key: round(value, 3) for key, value in figures.items()}))


if __name__ == "__main__":
    main()
