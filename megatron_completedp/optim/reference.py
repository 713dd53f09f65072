"""AdamW as written in the algorithm box: slow, plain, and the oracle of the fast backends."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_completedp.optim.backend import StepInputs
from megatron_completedp.optim.segments import AdamWValues


@torch.no_grad()
def reference_adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    values: AdamWValues,
    inputs: StepInputs,
) -> None:
    """One AdamW step on tensors that share one set of values, in their own precision, in place.

        g     = grad_scale * grad
        m     <- m + (1 - beta1) * (g - m)                                     exp_avg
        v     <- beta2 * v + (1 - beta2) * g^2                                 exp_avg_sq
        m_hat = m / (1 - beta1^step)
        v_hat = v / (1 - beta2^step)
        eta   = lr_fraction * lr
        theta <- (1 - eta * weight_decay) * theta - eta * m_hat / (sqrt(v_hat) + eps)

    Source: Loshchilov and Hutter 2019 (arXiv 1711.05101), algorithm 2, in the PyTorch convention,
    where the learning rate multiplies the decay. `grad` is left as it is.

    The operations come in the order of torch.optim.AdamW, with the bias corrections in scalars, so
    that float32 rounds as in the kernels. A weight that moves slowly rounds the same way in every
    step, and in another order 100 steps would drift apart by more than a wrong value might show.
    """
    g = inputs.grad_scale * grad
    eta = inputs.lr_fraction * values.lr
    step_size = eta / (1 - values.beta1**inputs.step)
    root_correction2 = (1 - values.beta2**inputs.step) ** 0.5
    param *= 1 - eta * values.weight_decay
    exp_avg.lerp_(g, 1 - values.beta1)
    exp_avg_sq.copy_(values.beta2 * exp_avg_sq + (1 - values.beta2) * g * g)
    param -= step_size * exp_avg / (exp_avg_sq.sqrt() / root_correction2 + values.eps)
