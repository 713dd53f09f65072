"""Build the Megatron model of a ModelShape.

Weights come out as NaN: `mcore.init` sets them, from generators that do not depend on the parallel
layout, and a parameter it forgot would turn the first loss into NaN instead of training on noise.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_completedp.config.parallel import ParallelConfig, check_layout
from megatron_completedp.core.hyperparams import ResidualMultiplier
from megatron_completedp.core.shape import ModelShape
from megatron_completedp.errors import ConfigError
from megatron_completedp.mcore.layer_spec import block_spec, use_transformer_engine
from megatron_completedp.mcore.loss import cross_entropy_with_z_loss
from megatron_completedp.mcore.platform import Platform

Precision = Literal["fp32", "bf16"]

logger = logging.getLogger(__name__)


class LanguageModel(GPTModel):
    """GPTModel whose training loss includes the z-loss.

    With labels, `forward` returns [b, s] losses: cross entropy plus z-loss in training mode, plain
    cross entropy in evaluation mode. `cross_entropy` holds the plain one of the latest forward in
    either mode, detached, for the training log.
    """

    def __init__(self, *args: Any, z_loss: float, logit_multiplier: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.z_loss = z_loss
        self.cross_entropy: Tensor | None = None
        if self.post_process and logit_multiplier != 1:
            # (c h) U^T = c (h U^T): scaling the input costs a pass over [tokens, hidden] instead of
            # one over [tokens, vocabulary], and holds for returned logits too.
            self.output_layer.register_forward_pre_hook(
                lambda _, inputs: (inputs[0] * logit_multiplier, *inputs[1:])
            )

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Per-token loss [b, s] from labels [b, s] and logits [s, b, V / TP]; Megatron's seam."""
        loss, cross_entropy = cross_entropy_with_z_loss(
            logits,
            labels.transpose(0, 1).contiguous(),
            self.z_loss if self.training else 0.0,
            self.pg_collection.tp,
        )
        self.cross_entropy = cross_entropy.transpose(0, 1)
        return loss.transpose(0, 1).contiguous()


def transformer_config(
    shape: ModelShape,
    parallel: ParallelConfig,
    *,
    precision: Precision,
    fuse_activation: bool = False,
) -> TransformerConfig:
    """Megatron's description of `shape` under `parallel`.

    `fuse_activation` compiles SwiGLU into one kernel; it pays on CUDA alone. Raises ConfigError
    when the layout does not divide the model.
    """
    check_layout(shape, parallel)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    recompute = parallel.recompute_granularity == "full"
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        softmax_scale=shape.softmax_scale,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_epsilon,
        qk_layernorm=True,
        add_bias_linear=False,
        gated_linear_unit=shape.gated,
        activation_func=F.silu if shape.gated else F.gelu,
        bias_activation_fusion=fuse_activation and shape.gated,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        # Interleaved on two stages, the next and the previous stage are one rank, and a batch of
        # sends and receives would pair activations with gradients; separate ones keep them apart.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        sequence_parallel=parallel.sequence_parallel,
        recompute_granularity="full" if recompute else None,
        recompute_method="uniform" if recompute else None,
        recompute_num_layers=1 if recompute else None,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=precision == "bf16",
        # Megatron 0.16 marks tensor-parallel weights only while it initializes them.
        perform_initialization=True,
        init_method=_fill_with_nan,
        output_layer_init_method=_fill_with_nan,
    )


def check_transformer_config(config: TransformerConfig) -> None:
    """Raise ConfigError for settings that would scale twice, or that the layers do not compute."""
    expected = {
        # Newer Megatron: its own learning-rate, init and logit factors on top of the table's.
        "use_mup": False,
        "perform_initialization": True,
        "qk_layernorm": True,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "context_parallel_size": 1,
    }
    for name, value in expected.items():
        actual = getattr(config, name, value)  # use_mup does not exist before 0.17
        if actual != value:
            raise ConfigError(
                f"TransformerConfig.{name} is {actual}; this model and its hyperparameter rules "
                f"need {value}. Build the config with transformer_config."
            )


def build_model(
    shape: ModelShape,
    parallel: ParallelConfig,
    *,
    platform: Platform,
    precision: Precision,
    residual: Sequence[ResidualMultiplier],
    logit_multiplier: float = 1.0,
    z_loss: float = 0.0,
    device: torch.device | None = None,
) -> list[LanguageModel]:
    """The model chunks of this rank, one per virtual pipeline chunk, before DDP and Float16Module.

    Needs `initialize_parallel`. Chunks lie on the platform's device; `torch.device("meta")` builds
    names, shapes and parallel attributes without memory, for a dry run. Weights are NaN until
    `mcore.init` sets them (gains are 1).

    Raises ConfigError when layout, shape and residual multipliers do not fit each other.
    """
    if not 0 < logit_multiplier < math.inf:
        raise ConfigError(f"logit_multiplier is {logit_multiplier}; expected a positive number.")
    if not 0 <= z_loss < math.inf:
        raise ConfigError(f"z_loss is {z_loss}; expected 0 (off) or a positive weight.")
    config = transformer_config(
        shape, parallel, precision=precision, fuse_activation=platform.name == "cuda"
    )
    device = device or platform.device
    # Megatron names the current device in each allocation, except on this path, which follows
    # torch's default device.
    config.use_cpu_initialization = device.type == "meta"
    check_transformer_config(config)
    transformer_engine = use_transformer_engine(platform)
    chunks = parallel.virtual_pipeline_model_parallel_size
    models = []
    with device:
        for vp_stage in (None,) if chunks is None else range(chunks):
            spec = block_spec(
                config, residual, transformer_engine=transformer_engine, vp_stage=vp_stage
            )
            models.append(
                LanguageModel(
                    config,
                    spec,
                    vocab_size=shape.padded_vocab_size,
                    max_sequence_length=shape.seq_length,
                    pre_process=_is_first_stage(vp_stage),
                    post_process=_is_last_stage(vp_stage, chunks),
                    share_embeddings_and_output_weights=shape.tied_embeddings,
                    position_embedding_type="rope",
                    rotary_base=shape.rotary_base,
                    vp_stage=vp_stage,
                    z_loss=z_loss,
                    logit_multiplier=logit_multiplier,
                )
            )
    return models


def _is_first_stage(vp_stage: int | None) -> bool:
    return parallel_state.get_pipeline_model_parallel_rank() == 0 and not vp_stage


def _is_last_stage(vp_stage: int | None, chunks: int | None) -> bool:
    last_rank = parallel_state.get_pipeline_model_parallel_world_size() - 1
    return parallel_state.get_pipeline_model_parallel_rank() == last_rank and (
        chunks is None or vp_stage == chunks - 1
    )


def _fill_with_nan(weight: Tensor) -> Tensor:
    return torch.nn.init.constant_(weight, math.nan)
