"""What both engines' scripts share: the model and the text of a plan, and its loss."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_completedp.config.load import load_config
from megatron_completedp.convert.hf_config import model_config
from megatron_completedp.data.indexed import bin_path, token_dtype
from megatron_completedp.plan.run_plan import Plan

#: Sequences of the validation text that a loss is the mean of, as in the quickstart.
VALIDATION_SAMPLES = 256


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The flags of both scripts."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", default="examples/quickstart/target.yaml", help="a run's YAML")
    parser.add_argument("--stop-at", type=int, help="stop after so many steps of the schedule")
    return parser


def load_plan(path: str) -> Plan:
    """The plan of the run at `path`; its `parallel` section is Megatron's and is not used."""
    plan = Plan.of(load_config(path))
    if plan.config.training.precision != "fp32":
        raise SystemExit(
            f"{path}: training.precision is {plan.config.training.precision}; these scripts train "
            "in fp32 alone. Set it to fp32, or add your engine's mixed precision."
        )
    return plan


def qwen3(plan: Plan) -> nn.Module:
    """A fresh Qwen3 with the sizes of the plan's model."""
    config = Qwen3Config(**model_config(plan.config.model), use_cache=False)
    return Qwen3ForCausalLM(config)


class Text:
    """Sequences of seq_length + 1 ids of one token file, in an order that the seed decides."""

    def __init__(self, plan: Plan, prefixes: tuple[str, ...], device: torch.device) -> None:
        (prefix,) = prefixes  # one file, no blend
        self.device = device
        dtype = token_dtype(plan.config.model.vocab_size)
        self.tokens = np.memmap(bin_path(Path(prefix)), dtype=dtype, mode="r")
        self.length = plan.config.model.seq_length
        count = (len(self.tokens) - 1) // self.length
        self.order = np.random.default_rng(plan.config.seed).permutation(count)

    def sequences(self, start: int, count: int) -> Tensor:
        """This rank's share of `count` sequences from number `start` on: [share, length + 1]."""
        share = range(start + dist.get_rank(), start + count, dist.get_world_size())
        offsets = [self.order[i % len(self.order)] * self.length for i in share]
        rows = [self.tokens[at : at + self.length + 1].astype(np.int64) for at in offsets]
        return torch.from_numpy(np.stack(rows)).to(self.device)


def loss_of(model: Callable[..., object], ids: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """Mean loss to differentiate (cross entropy and z-loss), and the cross entropy alone."""
    logits = model(input_ids=ids[:, :-1]).logits  # type: ignore[attr-defined]
    log_z = torch.logsumexp(logits, dim=-1)
    labels = ids[:, 1:].unsqueeze(-1)
    cross_entropy = (log_z - logits.gather(-1, labels).squeeze(-1)).mean()
    return cross_entropy + z_loss * log_z.square().mean(), cross_entropy.detach()


def mean(value: Tensor) -> float:
    """The mean over all ranks."""
    dist.all_reduce(value)
    return value.item() / dist.get_world_size()


@torch.no_grad()
def validation_loss(model: nn.Module, plan: Plan, device: torch.device) -> float:
    """Cross entropy of held-out text in nats per token."""
    text, size = Text(plan, plan.config.data.valid, device), plan.config.training.global_batch_size
    losses = [
        mean(loss_of(model, text.sequences(start, size), 0.0)[1])
        for start in range(0, VALIDATION_SAMPLES, size)
    ]
    return sum(losses) / len(losses)


def report(*values: object) -> None:
    """Print on rank 0."""
    if dist.get_rank() == 0:
        print(*values, flush=True)
