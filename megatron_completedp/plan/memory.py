"""Bytes on one rank, for the model as `mcore/` builds it: pre-norm, QK norm, flash attention.

Weights and optimizer, per element of this rank (e = 4 in fp32, 2 in bf16; DP is the number of
data-parallel ranks that share the optimizer under ZeRO-1, else 1):

    parameters e    gradients 4    masters 4 / DP (bf16 only)    moments 8 / DP

Fused kernels update in place, so the optimizer needs nothing on top. TP divides every matrix and
the vocabulary; gains are whole on each rank. With tied embeddings the last of several stages holds
a copy.

What one layer keeps of one token for the backward pass, in elements, with a = heads x head_dim / TP
and g = kv_heads x head_dim / TP, f = ffn_hidden_size / TP, h = hidden_size (/ TP under SP):

    norm input (the residual stream)           h        linear_qkv's input       h
    linear_qkv's output (k, v live in it)      a + 2g   q, copied out of it      a (GQA only)
    q and k after RoPE                         a + g    attention's output       a
    norm input                                 h        linear_fc1's input       h
    linear_fc1's output                        2f or f  linear_fc2's input       f

and in fp32, 4 bytes per head (log-sum-exp of attention) and per normalized row. RoPE keeps cos and
sin of q and k for each layer: 4 x head_dim elements per position of a sequence, not per token.

That is with fused kernels (`cuda`). On CPU torch composes two of them: RMSNorm keeps its input in
fp32 and the normalized input in fp32, and SwiGLU two more copies of f. On CPU alone, too, a bf16
gradient is copied to fp32 before it is added to the buffer, and gloo reduce-scatters a copy of all
gradients, when a step's activations are gone. The measured runs are CPU's.

The gradient of the embedding, in e, comes last, beside the other micro batches' activations.

The loss, per token, with v = vocabulary / TP: logits e v and their log-probabilities 4 v going
forward; log-probabilities and gradient 8 v coming back, with its copy in e (bf16). No layer has
freed anything by then, so this stands on top of all activations of the last stage. Afterwards only
the logits' gradient e v is left, beside the unembedding's gradient before it joins the fp32 buffer.

A stage keeps activations of every micro batch that is on its way: 1 without a pipeline, at most
PP - stage under 1F1B, and at most 2 (PP - stage - 1) + (VPP - 1) PP + 1 chunks of 1 / VPP of its
layers when interleaved. Full recomputation keeps a layer's input and, while going back, one layer.

Not counted: the CUDA context, NCCL's buffers, fragmentation (see `layouts.USABLE_MEMORY`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_completedp.config.parallel import ParallelConfig
from megatron_completedp.core.roles import GAIN_ROLES, MODULE_ROLES, OUTSIDE_STACK, Module
from megatron_completedp.core.shape import ModelShape

#: Whose kernels run: torch's compositions on CPU, fused ones on CUDA.
Kernels = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What the ranks of a layout compute in one step."""

    data_parallel_size: int
    """Model replicas."""
    micro_batch_size: int
    """Sequences in one forward pass."""
    micro_batches: int
    """Forward passes of one replica in one step."""
    precision: Literal["fp32", "bf16"]
    """Of weights and activations."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Peak bytes of one rank, by what holds them."""

    stage: int
    """Pipeline stage of the rank."""
    parameters: float
    gradients: float
    masters: float
    """fp32 copies of bf16 parameters."""
    moments: float
    activations: float
    """Kept for the backward pass, of all micro batches on their way."""
    working: float
    """What the most demanding operation needs on top: the loss, or one layer going back."""

    @property
    def total(self) -> float:
        """All of it."""
        return (
            self.parameters
            + self.gradients
            + self.masters
            + self.moments
            + self.activations
            + self.working
        )


def rank_modules(shape: ModelShape, parallel: ParallelConfig, stage: int) -> dict[Module, int]:
    """Elements of each module on one rank of pipeline stage `stage`, tied copies included."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    held = {}
    for module in shape.modules:
        elements = shape.module_parameters(module)
        if MODULE_ROLES[module] not in GAIN_ROLES:
            elements //= tp
        if module not in OUTSIDE_STACK:
            elements *= shape.num_layers // pp
        elif module is Module.EMBEDDING:
            elements *= stage == 0 or (shape.tied_embeddings and stage == pp - 1)
        else:
            elements *= stage == pp - 1
        if elements:
            held[module] = elements
    return held


def stage_memory(
    shape: ModelShape,
    parallel: ParallelConfig,
    workload: Workload,
    stage: int,
    *,
    kernels: Kernels = "cuda",
) -> Memory:
    """Peak memory of a rank of pipeline stage `stage` while it trains."""
    elements = sum(rank_modules(shape, parallel, stage).values())
    width = 2 if workload.precision == "bf16" else 4
    shards = workload.data_parallel_size if parallel.use_distributed_optimizer else 1
    tokens = workload.micro_batch_size * shape.seq_length
    layer = _Layer(shape, parallel, workload, kernels)
    recompute = parallel.recompute_granularity == "full"
    flying, layers = _on_their_way(shape, parallel, workload, stage)
    pipelined = parallel.pipeline_model_parallel_size > 1
    last = stage == parallel.pipeline_model_parallel_size - 1
    kept = layers * (layer.boundary if recompute else layer.kept)
    # A stage holds on to what it sent, too; the last one sends nothing on.
    kept += layer.boundary if pipelined and not last else 0
    activations = flying * kept
    working = layer.going_back + (layer.kept if recompute else 0)
    table = _table_gradient(shape, parallel, workload, kernels)
    if stage == 0:
        # Its own micro batch is gone by then, the others on their way are not.
        working = max(working, table - kept)
    if last:
        activations += layer.ending
        working = max(working, table, _loss(shape, parallel, workload, tokens, kernels))
    if kernels == "cpu" and shards > 1:
        working = max(working, 4.0 * elements - activations)
    return Memory(
        stage=stage,
        parameters=width * elements,
        gradients=4.0 * elements,
        masters=4.0 * elements / shards if width == 2 else 0.0,
        moments=8.0 * elements / shards,
        activations=activations,
        working=working + layer.gathered,
    )


def peak_memory(
    shape: ModelShape, parallel: ParallelConfig, workload: Workload, *, kernels: Kernels = "cuda"
) -> Memory:
    """Memory of the fullest rank."""
    return max(
        (
            stage_memory(shape, parallel, workload, stage, kernels=kernels)
            for stage in outer_stages(parallel)
        ),
        key=lambda memory: memory.total,
    )


def outer_stages(parallel: ParallelConfig) -> tuple[int, ...]:
    """The first and the last stage: no stage between them holds more of anything than the first."""
    last = parallel.pipeline_model_parallel_size - 1
    return (0, last) if last else (0,)


class _Layer:
    """Bytes of one micro batch in one layer, by the table in the module's text."""

    def __init__(
        self, shape: ModelShape, parallel: ParallelConfig, workload: Workload, kernels: Kernels
    ) -> None:
        tp = parallel.tensor_model_parallel_size
        e = 2 if workload.precision == "bf16" else 4
        fused = kernels == "cuda"
        tokens = workload.micro_batch_size * shape.seq_length
        h = shape.hidden_size / (tp if parallel.sequence_parallel else 1)
        a = shape.num_attention_heads * shape.head_dim / tp
        g = shape.kv_heads * shape.head_dim / tp
        f = shape.ffn_hidden_size / tp
        heads, kv_heads = shape.num_attention_heads / tp, shape.kv_heads / tp
        copied = a if kv_heads < heads else 0.0

        norm = h * e + 4 if fused else 2 * h * 4 + 4
        qk_norm = 4 * (heads + kv_heads)
        if fused:
            qk_norm += copied * e
        else:
            # The normalized q and k, and their input: upcast in bf16, in place already in fp32.
            qk_norm += 4 * (a + g) + (4 * (a + g) if e == 2 else 4 * copied)
        attention = norm + h * e + (a + 2 * g) * e + qk_norm + (2 * a + g) * e + 4 * heads
        ups = (2 if shape.gated else 1) + (2 if shape.gated and not fused else 0)
        mlp = norm + h * e + (ups + 1) * f * e
        rope = 4 * shape.head_dim * shape.seq_length * e
        self.kept = tokens * (attention + mlp) + rope
        self.boundary = tokens * h * e
        self.ending = tokens * (norm + h * e)
        # Gradients of the stream and of both sides of the activation; what fc2 kept is freed first.
        self.going_back = tokens * e * (h + (3 if shape.gated else 2) * f)
        # Under SP, Megatron gathers linear layers' inputs into one buffer that it keeps.
        gathers = parallel.sequence_parallel
        self.gathered = tokens * shape.hidden_size * e if gathers else 0.0


def _on_their_way(
    shape: ModelShape, parallel: ParallelConfig, workload: Workload, stage: int
) -> tuple[int, float]:
    """(forward passes whose backward pass is still to come at the peak, layers in each)."""
    pp = parallel.pipeline_model_parallel_size
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    layers = shape.num_layers / (pp * chunks)
    warmup = pp - stage - 1
    if chunks > 1:
        warmup = 2 * warmup + (chunks - 1) * pp
    return min(warmup + 1, workload.micro_batches * chunks), layers


def _table_gradient(
    shape: ModelShape, parallel: ParallelConfig, workload: Workload, kernels: Kernels
) -> float:
    """Bytes of the gradient of the embedding or unembedding before it joins the fp32 buffer."""
    elements = shape.module_parameters(Module.EMBEDDING) / parallel.tensor_model_parallel_size
    if workload.precision == "fp32":
        return 4 * elements
    return elements * (2 + (4 if kernels == "cpu" else 0))


def _loss(
    shape: ModelShape, parallel: ParallelConfig, workload: Workload, tokens: int, kernels: Kernels
) -> float:
    """Bytes of the readout and the loss at their peak, on top of what is kept."""
    tp = parallel.tensor_model_parallel_size
    e = 2 if workload.precision == "bf16" else 4
    v = shape.padded_vocab_size / tp
    # CPU's log-softmax of bf16 logits goes through a copy in fp32.
    forward = tokens * v * (e + 4 + (4 if e == 2 and kernels == "cpu" else 0))
    backward = tokens * v * (8 + (e if e == 2 else 0))
    readout = tokens * (v + shape.hidden_size) * e + v * shape.hidden_size * e
    return max(forward, backward, readout)
