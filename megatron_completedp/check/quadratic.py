"""AdamW on a noisy quadratic in one dimension: what batch and duration must leave as it is.

The stochastic differential equation behind the batch and duration rules of `core.tables` (Malladi
et al. 2022, arXiv 2205.10287) has a stationary state, whose spread is measured here over many
independent chains.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np

from megatron_completedp.core.hyperparams import BaseHyperparams, ResolvedHyperparams
from megatron_completedp.optim.segments import AdamWValues

#: Standard deviation of the gradient noise at the base batch.
NOISE = 1.0

#: Second derivative of the loss, in units of the noise: its part of the restoring force.
CURVATURE = 0.3

#: Chains side by side; with the samples below the spread is known to 0.4 %.
CHAINS = 4096

#: The base of this check. eps is as large as the noise, or its rule could not be seen, and decay is
#: most of the restoring force, or its rule could not.
BASE = BaseHyperparams(
    lr=0.004,
    weight_decay=0.5,
    gain_weight_decay=0.5,
    eps=NOISE,
    beta1=0.98,
    beta2=0.99,
    # Not used by a quadratic.
    hidden_init_std=1.0,
)


def values(hyperparams: ResolvedHyperparams) -> AdamWValues:
    """The five numbers that AdamW takes from a resolved module."""
    return AdamWValues(
        lr=hyperparams.lr,
        weight_decay=hyperparams.weight_decay,
        eps=hyperparams.eps,
        beta1=hyperparams.beta1,
        beta2=hyperparams.beta2,
    )


@cache
def stationary_std(adamw: AdamWValues, noise: float, *, seed: int = 0) -> float:
    """Standard deviation of theta in the stationary state of

        gradient = CURVATURE * theta + noise * normal(0, 1),

    under AdamW with these values. The relaxation time sets how long chains run: they are left alone
    for six of them and then sampled four times in each of the following twenty.
    """
    # Drift of theta per step: decay, and the gradient over the typical denominator.
    rate = adamw.lr * (adamw.weight_decay + CURVATURE / (noise + adamw.eps))
    relaxation = 1 / rate
    samples, between = 80, max(1, round(relaxation / 4))
    burn_in = math.ceil(6 * relaxation)
    generator = np.random.default_rng(seed)
    theta, mean, square = np.zeros((3, CHAINS))
    total = 0.0
    for step in range(1, burn_in + samples * between + 1):
        gradient = CURVATURE * theta + noise * generator.standard_normal(CHAINS)
        mean += (1 - adamw.beta1) * (gradient - mean)
        square += (1 - adamw.beta2) * (gradient * gradient - square)
        first = mean / (1 - adamw.beta1**step)
        second = np.sqrt(square / (1 - adamw.beta2**step))
        theta -= adamw.lr * (first / (second + adamw.eps) + adamw.weight_decay * theta)
        if step > burn_in and (step - burn_in) % between == 0:
            total += float(theta @ theta) / CHAINS
    return math.sqrt(total / samples)
