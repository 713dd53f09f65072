"""The four ratios between a target run and the base at which its hyperparameters were tuned."""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_completedp.errors import ConfigError

#: d_ff may be rounded to a friendly size; beyond this the "grows in proportion" premise is gone.
FFN_RATIO_TOLERANCE = 0.05


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Where a run stands on the four axes, with the sizes that must stay fixed or proportional."""

    hidden_size: int
    """Width of the residual stream."""
    ffn_hidden_size: int
    """Width of the MLP's hidden layer."""
    num_attention_heads: int
    """Query heads."""
    head_dim: int
    """Size of one head; must equal the other run's."""
    num_layers: int
    """Transformer layers."""
    batch_tokens: int
    """Tokens per optimizer step."""
    train_tokens: int
    """Tokens over the whole run."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value < 1:
                raise ConfigError(f"base.{field.name} is {value}; expected at least 1.")


@dataclass(frozen=True, kw_only=True)
class Ratios:
    """Target over base: width, depth, batch (tokens per step) and duration (tokens in all)."""

    m_N: float = 1.0
    m_L: float = 1.0
    m_B: float = 1.0
    m_D: float = 1.0

    @property
    def m_S(self) -> float:
        """Ratio of optimizer steps, m_D / m_B."""
        return self.m_D / self.m_B


def ratios_between(base: Scale, target: Scale) -> Ratios:
    """The ratios of `target` to `base`.

    Raises ConfigError when width did not grow by heads at a fixed head_dim with d_ff in
    proportion: the width exponents of `core.tables` hold only then.
    """
    if base.head_dim != target.head_dim:
        raise ConfigError(
            f"model.head_dim is {target.head_dim} but the base was tuned at {base.head_dim}; "
            "width must grow by adding heads at a fixed head_dim. Use the base's head_dim and "
            "change num_attention_heads."
        )
    if target.hidden_size * base.num_attention_heads != (
        base.hidden_size * target.num_attention_heads
    ):
        raise ConfigError(
            f"model.num_attention_heads is {target.num_attention_heads} at hidden_size "
            f"{target.hidden_size}; the base has {base.num_attention_heads} heads at "
            f"{base.hidden_size}. Heads must grow with width: expected "
            f"{base.num_attention_heads * target.hidden_size / base.hidden_size:g} heads."
        )
    m_N = target.hidden_size / base.hidden_size
    ffn_ratio = target.ffn_hidden_size / base.ffn_hidden_size
    if abs(ffn_ratio / m_N - 1) > FFN_RATIO_TOLERANCE:
        raise ConfigError(
            f"model.ffn_hidden_size is {target.ffn_hidden_size}, {ffn_ratio:g}x the base's, while "
            f"hidden_size is {m_N:g}x; it must grow in proportion. Expected about "
            f"{base.ffn_hidden_size * m_N:.0f}."
        )
    return Ratios(
        m_N=m_N,
        m_L=target.num_layers / base.num_layers,
        m_B=target.batch_tokens / base.batch_tokens,
        m_D=target.train_tokens / base.train_tokens,
    )
