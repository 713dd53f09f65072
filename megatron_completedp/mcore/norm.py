"""RMSNorm for every norm of the model."""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with Megatron's constructor; y = gain * x / sqrt(mean(x^2) + eps).

    Megatron's own wrapper refuses sequence parallelism. All it takes is the mark below: each TP
    rank then sees a part of the tokens, and `finalize_model_grads` sums the gain's gradient over
    the TP group where it finds the mark.

    The q and k norms see all tokens but only their rank's heads, so their gradient has to be summed
    over TP with and without sequence parallelism. Megatron does that by name (`q_layernorm`,
    `k_layernorm`) when `config.qk_layernorm` is on, and sums a parameter once even if both apply.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
