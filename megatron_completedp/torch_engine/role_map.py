"""Which parameter of a torch model is which module: a table of names, and labels made from it.

Unlike a Megatron tensor (`mcore.classify`), a parameter here is one module as a whole: torch's
optimizers have one set of hyperparameters for a tensor and cannot tell fused rows apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType

from torch import nn

from megatron_completedp.convert.mapping import ARCHITECTURES
from megatron_completedp.core.roles import OUTSIDE_STACK, Module
from megatron_completedp.core.shape import ModelShape
from megatron_completedp.errors import ClassificationError, ConfigError
from megatron_completedp.mcore.classify import module_shape

#: Modules that a role map may leave out: a model without QK norm has none.
OPTIONAL: frozenset[Module] = frozenset({Module.Q_NORM, Module.K_NORM})

#: What engines store as one tensor, in this order.
_FUSED = ((Module.Q, Module.K, Module.V), (Module.GATE, Module.UP))

#: Parts of a name that come from torch.compile and activation checkpointing, not from the model.
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_checkpoint_wrapped_module)\.")


@dataclass(frozen=True)
class RoleMap:
    """The parameter of each module, by name; {layer} stands for the layer's number, from 0."""

    model: str
    """Class of the models it describes, for messages."""
    names: Mapping[Module, str]
    """Ends in .weight; with {layer} for modules inside the stack, without it for the others."""

    def __post_init__(self) -> None:
        owners: dict[str, Module] = {}
        for module, name in self.names.items():
            wanted = 0 if module in OUTSIDE_STACK else 1
            if name.count("{layer}") != wanted or not name.endswith(".weight"):
                raise ConfigError(
                    f"role map {self.model}: {module} is {name!r}; expected a name that ends in "
                    f".weight with {wanted} times {{layer}}."
                )
            if name in owners:
                raise ConfigError(
                    f"role map {self.model}: {owners[name]} and {module} are both {name}. "
                    + _NO_SPLITTING
                )
            owners[name] = module

    def parameter_names(self, shape: ModelShape) -> dict[str, tuple[Module, int | None]]:
        """The (module, layer) of every parameter that a model of `shape` has.

        Raises ConfigError when the map has no name for a module of `shape`.
        """
        # Tied embeddings have one parameter, but logits still come out of a module of their own.
        needed = dict.fromkeys((*shape.modules, Module.UNEMBEDDING))
        missing = [m for m in needed if m not in self.names and m not in OPTIONAL]
        if missing:
            raise ConfigError(
                f"role map {self.model} has no name for {', '.join(missing)}, which the plan's "
                f"model has (activation {shape.activation}, tied_embeddings "
                f"{shape.tied_embeddings}). Add them, or correct the plan's model section."
            )
        return {
            self.names[module].format(layer=layer): (module, layer)
            for module in shape.modules
            if module in self.names
            for layer in ((None,) if module in OUTSIDE_STACK else range(shape.num_layers))
        }


@dataclass(frozen=True, kw_only=True)
class LabelledParameter:
    """One parameter with its label."""

    parameter: nn.Parameter
    name: str
    """In the bare model."""
    module: Module
    layer: int | None
    """None outside the stack."""

    @property
    def size(self) -> tuple[int, ...]:
        """Shape of the whole tensor, also where FSDP2 or ZeRO-3 hold a shard of it."""
        return tuple(getattr(self.parameter, "ds_shape", self.parameter.shape))


def label_parameters(
    model: nn.Module, role_map: RoleMap, shape: ModelShape
) -> tuple[LabelledParameter, ...]:
    """Label every parameter of `model` exactly once, in the model's order.

    Layers may be wrapped (torch.compile, activation checkpointing) and parameters sharded (FSDP2,
    ZeRO-3): names and whole sizes can be told there too.

    Raises:
        ClassificationError: a parameter has no module, two modules (tied embeddings in a plan
            without them), or another size than the plan's model; or a module has no parameter.
        ConfigError: the map lacks a module of `shape`.

    """
    places = role_map.parameter_names(shape)
    labels: dict[int, LabelledParameter] = {}
    for full_name, parameter in model.named_parameters(remove_duplicate=False):
        name = _WRAPPERS.sub("", full_name)
        first = labels.get(id(parameter))
        if first is not None:
            _check_tied(first.name, name, role_map, shape)
            continue
        if name not in places:
            raise _unmapped(name, parameter, role_map, shape)
        module, layer = places.pop(name)
        item = LabelledParameter(parameter=parameter, name=name, module=module, layer=layer)
        _check_size(item, shape)
        labels[id(parameter)] = item
    if places:
        raise ClassificationError(
            f"the model has no {next(iter(places))} ({len(places)} parameters of the plan are "
            f"missing); the plan's model has {shape.num_layers} layers. Build the model from the "
            "plan's model section, and use the role map of its class."
        )
    return tuple(labels.values())


def _check_tied(first: str, second: str, role_map: RoleMap, shape: ModelShape) -> None:
    """A parameter under a second name: right for a tied embedding alone."""
    ends = (role_map.names[Module.EMBEDDING], role_map.names[Module.UNEMBEDDING])
    if shape.tied_embeddings and (first, second) == ends:
        return
    raise ClassificationError(
        f"{first} and {second} are one parameter, but have two roles: one weight cannot follow two "
        "rows of the rules. Build the model with tie_word_embeddings=False; or, where the rows "
        "agree (completep, sp), set model.tied_embeddings in the plan."
    )


def _unmapped(
    name: str, parameter: nn.Parameter, role_map: RoleMap, shape: ModelShape
) -> ClassificationError:
    pattern = re.sub(r"\.\d+\.", ".{layer}.", name)
    (nearest,) = get_close_matches(pattern, role_map.names.values(), n=1, cutoff=0.0)
    if pattern == nearest:
        reason = f"the plan's model has {shape.num_layers} layers; build both alike"
    elif name.endswith("bias"):
        reason = "biases are not part of the plan's model; build it without"
    else:
        reason = f"the nearest name of the role map is {nearest}; correct the map or the model"
    fused = _fused(tuple(parameter.shape), shape)
    return ClassificationError(
        f"{name} with shape {tuple(parameter.shape)} has no module in role map {role_map.model}: "
        f"{fused or reason}. A parameter without a module would train with unscaled "
        "hyperparameters."
    )


def _check_size(item: LabelledParameter, shape: ModelShape) -> None:
    rows, *columns = module_shape(item.module, shape)
    allowed = [(rows, *columns)]
    if item.module in (Module.EMBEDDING, Module.UNEMBEDDING):
        allowed.append((shape.vocab_size, *columns))  # padding is Megatron's own
    if item.size not in allowed:
        reason = _fused(item.size, shape) or (
            "the plan's model section describes another model, and its ratios would be wrong"
        )
        raise ClassificationError(
            f"{item.name} has shape {item.size}; expected {allowed[-1]} for {item.module}: "
            f"{reason}."
        )


def _fused(size: tuple[int, ...], shape: ModelShape) -> str | None:
    """What to say of a tensor that is as large as several modules in one."""
    for modules in _FUSED:
        present = [module for module in modules if module in shape.modules]
        rows = sum(module_shape(module, shape)[0] for module in present)
        if len(present) > 1 and size == (rows, shape.hidden_size):
            return f"it has the size of {', '.join(present)} fused into one tensor. {_NO_SPLITTING}"
    return None


_NO_SPLITTING = (
    "A torch parameter group holds whole tensors, so one tensor cannot follow the rules of several "
    "modules: use a model with separate projections, or the Megatron engine, which tells fused "
    "rows apart"
)


def _shipped(class_name: str) -> Mapping[Module, str]:
    return next(item.names for item in ARCHITECTURES if item.class_name == class_name)


#: Models of transformers. Qwen3 (SwiGLU) and Apertus (GELU) compute the layers of the plan's model;
#: Llama does without its QK norm.
QWEN3 = RoleMap("Qwen3ForCausalLM", _shipped("Qwen3ForCausalLM"))
APERTUS = RoleMap("ApertusForCausalLM", _shipped("ApertusForCausalLM"))
LLAMA = RoleMap(
    "LlamaForCausalLM",
    MappingProxyType({m: name for m, name in QWEN3.names.items() if m not in OPTIONAL}),
)
