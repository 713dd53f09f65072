"""Core attention on torch's scaled_dot_product_attention, for the layers without TE."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812 - torch's own convention
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_completedp.errors import ConfigError


class SdpaAttention(MegatronModule):
    """softmax(scale * Q K^T + causal mask) V, in flash form where torch has a kernel for it.

    Same constructor and forward contract as Megatron's DotProductAttention, which materializes the
    [s, s] scores and is the oracle in the tests. Differences: causal self-attention only.

    Raises ConfigError for context parallelism, dropout and masks other than causal.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        unsupported = {
            "context_parallel_size": (config.context_parallel_size, 1),
            "attention_dropout": (dropout, 0.0),
            "attn_mask_type": (attn_mask_type, AttnMaskType.causal),
            "attention_type": (attention_type, "self"),
            "window_size": (config.window_size, None),
            "softmax_type": (config.softmax_type, "vanilla"),
            "apply_query_key_layer_scaling": (config.apply_query_key_layer_scaling, False),
        }
        for name, (value, expected) in unsupported.items():
            if value != expected:
                raise ConfigError(
                    f"{name} is {value}, but SdpaAttention computes causal self-attention with "
                    f"{name} = {expected}; set it so, or use Transformer Engine's attention."
                )
        # None leaves the scale to torch: 1/sqrt(head_dim), as in Megatron.
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend: query [s, b, heads, d], key and value [s, b, groups, d] -> [s, b, heads * d].

        Head counts are this TP rank's. Raises ConfigError for inputs that causal attention over one
        whole sequence cannot honour.
        """
        for name, given in (
            ("attention_mask", attention_mask),
            ("attention_bias", attention_bias),
            ("packed_seq_params", packed_seq_params),
        ):
            if given is not None:
                raise ConfigError(
                    f"{name} was given, but SdpaAttention applies the causal mask and nothing "
                    f"else; pass {name}=None."
                )
        if query.size(0) != key.size(0):
            raise ConfigError(
                f"attention got {query.size(0)} queries and {key.size(0)} keys; expected as many "
                "of both: SdpaAttention has no key/value cache."
            )
        context = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=query.size(2) != key.size(2),
        )
        return context.permute(2, 0, 1, 3).flatten(start_dim=2).contiguous()
