"""AdamW with one hyperparameter set per parameter group, on torch's fused kernel.

Megatron's optimizers hold an inner optimizer and, for checkpoints, expect the layout of Apex's
FusedAdam: the step count in each param group, not in the state of each parameter. With torch's own
AdamW inside, the DistributedOptimizer trains and saves but cannot load (megatron-core 0.16.1 and
0.19.2). This class keeps that layout and runs the same kernel as `torch.optim.AdamW(fused=True)`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim.adamw import adamw


class GroupedAdamW(torch.optim.Optimizer):
    """theta <- theta - lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * theta), per group.

    The constructor takes the arguments that Megatron passes to Apex's FusedAdam. Raises ValueError
    for what it does not do: Adam with L2 regularisation, no bias correction, CUDA graphs.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        adam_w_mode: bool = True,
        bias_correction: bool = True,
        capturable: bool = False,
    ) -> None:
        if capturable or not (adam_w_mode and bias_correction):
            raise ValueError(
                "GroupedAdamW has decoupled weight decay and bias correction, outside CUDA graphs"
            )
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "betas": betas,
            "eps": eps,
            "bias_correction": True,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; the step count moves in empty groups too."""
        for group in self.param_groups:
            finished = group.get("step", 0)
            group["step"] = finished + 1
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            states = [self._state(p) for p in params]
            # One allocation; the kernel wants a step tensor of its own for each parameter.
            steps = torch.full((len(params),), float(finished), device=params[0].device)
            beta1, beta2 = group["betas"]
            adamw(
                params,
                [p.grad for p in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                list(steps.unbind()),
                foreach=False,
                capturable=False,
                differentiable=False,
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )

    def _state(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self.state[param]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        return state
