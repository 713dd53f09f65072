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
        m     <- beta1 * m + (1 - beta1) * g           exp_avg
        v     <- beta2 * v + (1 - beta2) * g^2         exp_avg_sq
        m_hat = m / (1 - beta1^step)
        v_hat = v / (1 - beta2^step)
        eta   = lr_fraction * lr
        theta <- theta - eta * (m_hat / (sqrt(v_hat) + eps) + weight_decay * theta)

    Source: Loshchilov and Hutter 2019 (arXiv 1711.05101), algorithm 2, in the PyTorch convention,
    where the learning rate multiplies the decay. `grad` is left as it is.
    """
    g = inputs.grad_scale * grad
    exp_avg.copy_(values.beta1 * exp_avg + (1 - values.beta1) * g)
    exp_avg_sq.copy_(values.beta2 * exp_avg_sq + (1 - values.beta2) * g**2)
    m_hat = exp_avg / (1 - values.beta1**inputs.step)
    v_hat = exp_avg_sq / (1 - values.beta2**inputs.step)
    eta = inputs.lr_fraction * values.lr
    param -= eta * (m_hat / (v_hat.sqrt() + values.eps) + values.weight_decay * param)
