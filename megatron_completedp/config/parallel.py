"""How a run is split over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_completedp.core.shape import ModelShape
from megatron_completedp.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Tensor, pipeline and data parallelism, with Megatron's names.

    Data parallelism is what remains: world size / (tensor x pipeline).
    """

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer's matrices (TP)."""
    pipeline_model_parallel_size: int = 1
    """Stages that share the layers (PP)."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks per stage, interleaved schedule (VPP); none means one chunk."""
    sequence_parallel: bool = False
    """Split norms and residuals over the TP group's sequence dimension (SP)."""
    use_distributed_optimizer: bool = False
    """Shard optimizer state over the DP group (ZeRO-1)."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the forward pass runs (distributed optimizer only)."""
    recompute_granularity: Literal["none", "full"] = "none"
    """full keeps each layer's input alone and computes the layer again for the backward pass."""

    @property
    def model_parallel_size(self) -> int:
        """Ranks of one model replica."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size

    def __post_init__(self) -> None:
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"parallel.{name} is {value}; expected at least 1.")
        if self.recompute_granularity not in ("none", "full"):
            raise ConfigError(
                f"parallel.recompute_granularity is {self.recompute_granularity!r}; expected one "
                "of none, full."
            )
        chunks = self.virtual_pipeline_model_parallel_size
        if chunks is not None and (chunks < 2 or self.pipeline_model_parallel_size < 2):
            raise ConfigError(
                f"parallel.virtual_pipeline_model_parallel_size is {chunks} with "
                f"pipeline_model_parallel_size {self.pipeline_model_parallel_size}; interleaving "
                "needs at least 2 chunks and 2 stages. Leave it out for the plain schedule."
            )
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ConfigError(
                "parallel.sequence_parallel is on with tensor_model_parallel_size 1; it splits "
                "over the TP group. Raise tensor_model_parallel_size or turn it off."
            )
        if self.overlap_param_gather and not (
            self.use_distributed_optimizer and self.overlap_grad_reduce
        ):
            raise ConfigError(
                "parallel.overlap_param_gather needs use_distributed_optimizer and "
                "overlap_grad_reduce; turn them on too."
            )


def check_layout(shape: ModelShape, parallel: ParallelConfig) -> None:
    """Raise ConfigError, naming the fix, when `parallel` cannot split a model of `shape`."""
    tp = parallel.tensor_model_parallel_size
    for name, value in (
        ("num_attention_heads", shape.num_attention_heads),
        ("num_query_groups", shape.kv_heads),
        ("ffn_hidden_size", shape.ffn_hidden_size),
        ("vocab_multiple", shape.vocab_multiple),
    ):
        if value % tp:
            raise ConfigError(
                f"model.{name} is {value}, which parallel.tensor_model_parallel_size = {tp} does "
                f"not divide; use a TP size that divides it or change {name}."
            )
    if parallel.sequence_parallel and shape.seq_length % tp:
        raise ConfigError(
            f"model.seq_length is {shape.seq_length}, which parallel.tensor_model_parallel_size = "
            f"{tp} does not divide, and sequence_parallel splits it; change one of them."
        )
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    stages = parallel.pipeline_model_parallel_size * chunks
    if shape.num_layers % stages:
        raise ConfigError(
            f"model.num_layers is {shape.num_layers}, which "
            f"{parallel.pipeline_model_parallel_size} pipeline stages x {chunks} virtual chunks = "
            f"{stages} do not divide; choose sizes whose product divides it."
        )
