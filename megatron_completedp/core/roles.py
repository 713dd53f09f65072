"""What a parameter is: its module (which tensor type) and its role (which row of the table).

A *module* is a tensor type that owns hyperparameters of its own (13 without a gate, 14 with one). A
*role* is a row of the parametrization table; several modules share one.
"""

from __future__ import annotations

from enum import StrEnum
from types import MappingProxyType


class Role(StrEnum):
    """A row of the table. Values are what configs, plans and logs print."""

    EMBEDDING = "embedding"
    HIDDEN_WEIGHT = "hidden_weight"
    # o and mlp down share the hidden row in the paper; Megatron's default init treats them apart.
    BRANCH_OUTPUT_WEIGHT = "branch_output_weight"
    HIDDEN_BIAS = "hidden_bias"
    PRE_NORM_GAIN = "pre_norm_gain"
    QK_NORM_GAIN = "qk_norm_gain"
    FINAL_NORM_GAIN = "final_norm_gain"
    UNEMBEDDING = "unembedding"
    UNEMBEDDING_BIAS = "unembedding_bias"


class Module(StrEnum):
    """A tensor type with hyperparameters of its own, also where the engine fuses it with others."""

    EMBEDDING = "embedding"
    ATTENTION_NORM = "attention_norm"
    Q = "q"
    K = "k"
    V = "v"
    Q_NORM = "q_norm"
    K_NORM = "k_norm"
    O = "o"  # noqa: E741 - the paper's name
    MLP_NORM = "mlp_norm"
    GATE = "gate"
    UP = "up"
    DOWN = "down"
    FINAL_NORM = "final_norm"
    UNEMBEDDING = "unembedding"


MODULE_ROLES: MappingProxyType[Module, Role] = MappingProxyType(
    {
        Module.EMBEDDING: Role.EMBEDDING,
        Module.ATTENTION_NORM: Role.PRE_NORM_GAIN,
        Module.Q: Role.HIDDEN_WEIGHT,
        Module.K: Role.HIDDEN_WEIGHT,
        Module.V: Role.HIDDEN_WEIGHT,
        Module.Q_NORM: Role.QK_NORM_GAIN,
        Module.K_NORM: Role.QK_NORM_GAIN,
        Module.O: Role.BRANCH_OUTPUT_WEIGHT,
        Module.MLP_NORM: Role.PRE_NORM_GAIN,
        Module.GATE: Role.HIDDEN_WEIGHT,
        Module.UP: Role.HIDDEN_WEIGHT,
        Module.DOWN: Role.BRANCH_OUTPUT_WEIGHT,
        Module.FINAL_NORM: Role.FINAL_NORM_GAIN,
        Module.UNEMBEDDING: Role.UNEMBEDDING,
    }
)

#: Modules that exist once, outside the residual stack; they have no layer and no depth factor.
OUTSIDE_STACK: frozenset[Module] = frozenset(
    {Module.EMBEDDING, Module.FINAL_NORM, Module.UNEMBEDDING}
)

#: Roles whose parameters start at 1 (gains) or 0 (biases): no init std, and normally no decay.
GAIN_ROLES: frozenset[Role] = frozenset(
    {Role.PRE_NORM_GAIN, Role.QK_NORM_GAIN, Role.FINAL_NORM_GAIN}
)
BIAS_ROLES: frozenset[Role] = frozenset({Role.HIDDEN_BIAS, Role.UNEMBEDDING_BIAS})
