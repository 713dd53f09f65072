"""Train transformers' Qwen3 under a plan with PyTorch's FSDP2, on CPU or GPUs.

torchrun --nproc-per-node 2 examples/engines/fsdp2.py
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from common import Text, arguments, load_plan, loss_of, mean, qwen3, report, validation_loss
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from megatron_completedp.torch_engine import (
    QWEN3,
    apply_multipliers,
    describe_groups,
    init_,
    lr_scheduler,
    param_groups,
)


def main() -> None:
    """Train and print losses."""
    options = arguments(__doc__).parse_args()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    plan = load_plan(options.config)
    training = plan.config.training

    model = qwen3(plan).to(device)
    apply_multipliers(model, QWEN3, plan)
    init_(model, QWEN3, plan)
    report(describe_groups(model, QWEN3, plan))
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # After fully_shard, which replaces the parameters.
    optimizer = torch.optim.AdamW(param_groups(model, QWEN3, plan))
    scheduler = lr_scheduler(optimizer, plan)

    text = Text(plan, plan.config.data.train, device)
    for step in range(options.stop_at or plan.config.steps):
        size = training.global_batch_size
        ids = text.sequences(step * size, size)
        loss, cross_entropy = loss_of(model, ids, training.z_loss)
        loss.backward()
        if training.clip_grad:
            torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        train_loss = mean(cross_entropy)
        if (step + 1) % plan.config.logging.interval == 0:
            report(f"step {step + 1}  loss {train_loss:.6f}")
    report(f"validation loss {validation_loss(model, plan, device):.6f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
