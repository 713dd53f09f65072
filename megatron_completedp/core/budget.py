"""What a run costs: parameters, tokens, steps and FLOPs."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_completedp.core.roles import GAIN_ROLES, MODULE_ROLES, OUTSIDE_STACK, Module
from megatron_completedp.core.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Sizes of a run, all derived from its shape and its tokens."""

    parameters: int
    """All parameters, the padded vocabulary included."""
    embedding_parameters: int
    """Of those, the input embedding and the unembedding."""
    train_tokens: int
    batch_tokens: int
    """Tokens per optimizer step."""
    steps: int
    """Optimizer steps."""
    flops: float
    """Training FLOPs by the field's 6 N D with all parameters; what compute ratios quote."""
    model_flops_per_token: float
    """Matrix products of one token, forward and backward, causal attention counted at half."""


def budget(shape: ModelShape, *, batch_tokens: int, train_tokens: int) -> Budget:
    """The budget of training a model of `shape`; a last partial batch counts as a step."""
    ends = (Module.EMBEDDING, Module.UNEMBEDDING)
    return Budget(
        parameters=shape.parameters,
        embedding_parameters=sum(shape.module_parameters(m) for m in ends if m in shape.modules),
        train_tokens=train_tokens,
        batch_tokens=batch_tokens,
        steps=-(-train_tokens // batch_tokens),
        flops=6.0 * shape.parameters * train_tokens,
        model_flops_per_token=model_flops_per_token(shape),
    )


def model_flops_per_token(shape: ModelShape) -> float:
    """FLOPs of one trained token: 2 per weight forward, twice that backward, plus attention.

    Causal attention needs two products of (seq_length / 2) x head_dim per head on average. This is
    the numerator of model FLOP/s utilisation; recomputation is not counted.
    """
    weights = sum(
        shape.module_parameters(module) * (1 if module in OUTSIDE_STACK else shape.num_layers)
        for module in shape.modules
        if module is not Module.EMBEDDING and MODULE_ROLES[module] not in GAIN_ROLES
    )
    if shape.tied_embeddings:
        weights += shape.module_parameters(Module.EMBEDDING)  # the readout uses it
    attention = shape.num_layers * shape.num_attention_heads * shape.head_dim * shape.seq_length
    return 6.0 * (weights + attention)
