"""Train transformers' Qwen3 under a plan with DeepSpeed ZeRO, on CPU or GPUs.

DS_ACCELERATOR=cpu torchrun --nproc-per-node 2 examples/engines/zero.py --stage 2
"""

from __future__ import annotations

import deepspeed
import torch
import torch.distributed as dist
from common import Text, arguments, load_plan, loss_of, mean, qwen3, report, validation_loss

from megatron_completedp.torch_engine import (
    QWEN3,
    apply_multipliers,
    check_groups,
    describe_groups,
    init_,
    lr_scheduler,
    param_groups,
)


def main() -> None:
    """Train and print losses."""
    parser = arguments(__doc__)
    parser.add_argument("--stage", type=int, default=2, choices=[1, 2, 3], help="of ZeRO")
    options = parser.parse_args()
    deepspeed.init_distributed()
    plan = load_plan(options.config)
    training = plan.config.training

    model = qwen3(plan)
    apply_multipliers(model, QWEN3, plan)
    init_(model, QWEN3, plan)
    report(describe_groups(model, QWEN3, plan))
    # Before initialize, which copies weights and takes the optimizer over.
    optimizer = torch.optim.AdamW(param_groups(model, QWEN3, plan))
    engine, optimizer, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        # Not a scheduler of the configuration: those level the groups' learning rates.
        lr_scheduler=lr_scheduler(optimizer, plan),
        config={
            "train_batch_size": training.global_batch_size,
            "train_micro_batch_size_per_gpu": training.global_batch_size // dist.get_world_size(),
            "gradient_clipping": training.clip_grad,
            "zero_optimization": {"stage": options.stage},
            "zero_allow_untested_optimizer": True,
        },
    )

    text = Text(plan, plan.config.data.train, engine.device)
    for step in range(options.stop_at or plan.config.steps):
        size = training.global_batch_size
        ids = text.sequences(step * size, size)
        loss, cross_entropy = loss_of(engine, ids, training.z_loss)
        engine.backward(loss)
        engine.step()
        train_loss = mean(cross_entropy)
        if (step + 1) % plan.config.logging.interval == 0:
            check_groups(optimizer, plan)
            report(f"step {step + 1}  loss {train_loss:.6f}")
    report(f"validation loss {validation_loss(engine, plan, engine.device):.6f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
