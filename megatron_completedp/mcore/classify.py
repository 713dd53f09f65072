"""Label every parameter of a Megatron model with the module that owns it; treatment comes later.

A fused weight holds several modules: q, k and v interleave in `linear_qkv`, gate and up share
`linear_fc1`. A label is therefore a list of row ranges, and each row has exactly one module.
Nothing here imports torch or Megatron: labels depend on names and shapes alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from megatron_completedp.config.parallel import ParallelConfig, check_layout
from megatron_completedp.core.roles import GAIN_ROLES, MODULE_ROLES, Module
from megatron_completedp.core.shape import ModelShape
from megatron_completedp.errors import ClassificationError

if TYPE_CHECKING:
    from torch import nn

#: Parameter names inside `decoder.layers.<n>.`, with the modules their rows hold. Where two names
#: lead to one norm, the first is Megatron's own layer and the second Transformer Engine's, which
#: fuses the norm into the linear layer behind it.
_LAYER_MODULES: dict[str, tuple[Module, ...]] = {
    "input_layernorm.weight": (Module.ATTENTION_NORM,),
    "self_attention.linear_qkv.layer_norm_weight": (Module.ATTENTION_NORM,),
    "self_attention.linear_qkv.weight": (Module.Q, Module.K, Module.V),
    "self_attention.q_layernorm.weight": (Module.Q_NORM,),
    "self_attention.k_layernorm.weight": (Module.K_NORM,),
    "self_attention.linear_proj.weight": (Module.O,),
    "pre_mlp_layernorm.weight": (Module.MLP_NORM,),
    "mlp.linear_fc1.layer_norm_weight": (Module.MLP_NORM,),
    "mlp.linear_fc1.weight": (Module.GATE, Module.UP),
    "mlp.linear_fc2.weight": (Module.DOWN,),
}
_OUTER_MODULES: dict[str, tuple[Module, ...]] = {
    "embedding.word_embeddings.weight": (Module.EMBEDDING,),
    "decoder.final_layernorm.weight": (Module.FINAL_NORM,),
    "output_layer.weight": (Module.UNEMBEDDING,),
}
#: A parameter inside the stack: its layer and its name there.
LAYER_NAME = re.compile(r"decoder\.layers\.(?P<layer>\d+)\.(?P<tensor>.+)")


@dataclass(frozen=True)
class RowRange:
    """Rows [start, stop) of a local tensor, and the module they belong to."""

    start: int
    stop: int
    module: Module


@dataclass(frozen=True, kw_only=True)
class ClassifiedParameter:
    """One parameter of this rank, with its label."""

    parameter: nn.Parameter
    """The local tensor: this rank's TP shard."""
    global_name: str
    """Name in the whole model: layers counted from 0 over all stages, no wrapper prefixes."""
    layer: int | None
    """Global layer, from 0; None outside the stack."""
    ranges: tuple[RowRange, ...]
    """Every row exactly once, in order."""
    partition_dim: int | None
    """Dimension that tensor parallelism splits; None when each TP rank holds a full copy."""

    @property
    def is_tied_copy(self) -> bool:
        """Whether this is the last stage's copy of a tied embedding, owned by the first stage."""
        return (
            self.global_name == "output_layer.weight" and self.ranges[0].module is Module.EMBEDDING
        )


def module_shape(module: Module, shape: ModelShape) -> tuple[int, ...]:
    """Shape of one whole, unfused module: (out, in) for a matrix, (size,) for a gain."""
    if module in (Module.Q_NORM, Module.K_NORM):
        return (shape.head_dim,)
    if MODULE_ROLES[module] in GAIN_ROLES:
        return (shape.hidden_size,)
    rows = shape.module_parameters(module) // shape.hidden_size
    if partition_dim(module) == 1:  # o and down lead back into the residual stream
        return (shape.hidden_size, rows)
    return (rows, shape.hidden_size)


def partition_dim(module: Module) -> int | None:
    """Dimension of `module` that tensor parallelism splits; None for gains, which are copied.

    Rows of the embeddings (vocabulary), q, k, v, gate and up (outputs); columns of o and down
    (inputs), whose partial products the TP group adds.
    """
    if MODULE_ROLES[module] in GAIN_ROLES:
        return None
    return 1 if module in (Module.O, Module.DOWN) else 0


def classify(
    name: str, local_shape: tuple[int, ...], shape: ModelShape, tp_size: int
) -> tuple[RowRange, ...]:
    """Label the rows of one local tensor.

    Args:
        name: parameter name in the bare model; its layer number may be local or global.
        local_shape: shape of this rank's tensor.
        shape: the whole model.
        tp_size: ranks that share each layer's matrices.

    Returns:
        Half-open ranges over the first dimension, in order, each row exactly once.

    Raises:
        ClassificationError: the name is unknown or the shape is not the one this model has.
        ConfigError: `tp_size` cannot split the model.

    """
    check_layout(shape, ParallelConfig(tensor_model_parallel_size=tp_size))
    modules = _modules_of(name, local_shape, shape)
    split = partition_dim(modules[0])
    sizes = [list(module_shape(module, shape)) for module in modules]
    if split is not None:
        for size in sizes:
            size[split] //= tp_size
    expected = (sum(size[0] for size in sizes), *sizes[0][1:])
    if tuple(local_shape) != expected:
        raise ClassificationError(
            f"{name} has shape {tuple(local_shape)}; expected {expected} for "
            f"{' + '.join(modules)} at tensor_model_parallel_size {tp_size}. The model was not "
            "built from this shape and layout; build it with both."
        )
    # One block of q, k and v per query group; every other tensor is a single block.
    blocks = shape.kv_heads // tp_size if Module.Q in modules else 1
    ranges, start = [], 0
    for module, rows in [(m, s[0] // blocks) for m, s in zip(modules, sizes, strict=True)] * blocks:
        ranges.append(RowRange(start, start + rows, module))
        start += rows
    assert start == expected[0], f"{name}: ranges end at row {start} of {expected[0]}"
    assert all(left.stop == right.start for left, right in pairwise(ranges)), name
    return tuple(ranges)


def classify_model(
    chunks: Sequence[nn.Module], shape: ModelShape, parallel: ParallelConfig
) -> tuple[ClassifiedParameter, ...]:
    """Label every parameter of this rank's model chunks exactly once.

    Args:
        chunks: one GPTModel per virtual pipeline stage, bare or wrapped (DDP, Float16Module).
        shape: the whole model.
        parallel: how it is split.

    Raises:
        ClassificationError: a parameter has no label, or its Megatron partition attributes
            contradict its label (they decide which ranks count in the gradient norm).

    """
    tp_size = parallel.tensor_model_parallel_size
    classified: list[ClassifiedParameter] = []
    for chunk in chunks:
        model = _unwrap(chunk)
        layer_numbers = [layer.layer_number - 1 for layer in model.decoder.layers]
        for name, parameter in model.named_parameters():
            ranges = classify(name, tuple(parameter.shape), shape, tp_size)
            match = LAYER_NAME.fullmatch(name)
            layer = layer_numbers[int(match["layer"])] if match else None
            item = ClassifiedParameter(
                parameter=parameter,
                global_name=f"decoder.layers.{layer}.{match['tensor']}" if match else name,
                layer=layer,
                ranges=ranges,
                partition_dim=partition_dim(ranges[0].module),
            )
            if tp_size > 1:
                _check_partition(item)
            classified.append(item)
    names = Counter(item.global_name for item in classified)
    assert len(names) == len(classified), f"labelled twice: {names.most_common(1)}"
    return tuple(classified)


def _modules_of(name: str, local_shape: tuple[int, ...], shape: ModelShape) -> tuple[Module, ...]:
    match = LAYER_NAME.fullmatch(name)
    known, tensor = (_LAYER_MODULES, match["tensor"]) if match else (_OUTER_MODULES, name)
    if tensor not in known:
        reason = (
            "biases are not part of this model; build it with add_bias_linear=False"
            if tensor.endswith("bias")
            else f"expected one of {', '.join(known)}"
        )
        raise ClassificationError(
            f"{name} with shape {tuple(local_shape)} has no module: {reason}. A parameter without "
            "a module would train with unscaled hyperparameters."
        )
    modules = known[tensor]
    if modules == (Module.GATE, Module.UP) and not shape.gated:
        return (Module.UP,)
    if modules == (Module.UNEMBEDDING,) and shape.tied_embeddings:
        return (Module.EMBEDDING,)
    return modules


def _unwrap(chunk: nn.Module) -> Any:
    model: Any = chunk
    while hasattr(model, "module"):
        model = model.module
    return model


def _check_partition(item: ClassifiedParameter) -> None:
    # Attributes that Megatron sets, so no type knows them.
    split = getattr(item.parameter, "tensor_model_parallel", False)
    found = getattr(item.parameter, "partition_dim", None) if split else None
    if found != item.partition_dim:
        raise ClassificationError(
            f"{item.global_name} is marked as split along dimension {found} by Megatron; expected "
            f"{item.partition_dim}. The gradient norm would count it wrongly; build the model with "
            "perform_initialization=True, which sets these marks."
        )
