"""The rules on any torch model, for engines other than Megatron: plain torch, FSDP2, DeepSpeed.

    model = Qwen3ForCausalLM(config)
    apply_multipliers(model, QWEN3, plan)              # residual branches, logits, softmax scale
    init_(model, QWEN3, plan)                          # every weight with its own std
    groups = param_groups(model, QWEN3, plan)          # for torch.optim.AdamW, FSDP2 or DeepSpeed
    optimizer = torch.optim.AdamW(groups)
    scheduler = lr_scheduler(optimizer, plan)

All of it is one parametrization: `param_groups` refuses a model whose multipliers are missing.
Imports neither Megatron nor DeepSpeed nor transformers.
"""

from megatron_completedp.torch_engine.groups import (
    check_groups,
    describe_groups,
    lr_scheduler,
    param_groups,
)
from megatron_completedp.torch_engine.init import init_
from megatron_completedp.torch_engine.multipliers import apply_multipliers
from megatron_completedp.torch_engine.role_map import APERTUS, LLAMA, QWEN3, RoleMap

__all__ = [
    "APERTUS",
    "LLAMA",
    "QWEN3",
    "RoleMap",
    "apply_multipliers",
    "check_groups",
    "describe_groups",
    "init_",
    "lr_scheduler",
    "param_groups",
]
