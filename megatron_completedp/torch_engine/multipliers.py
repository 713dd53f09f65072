"""The factors of the forward pass, as hooks on the modules whose output they scale.

Folding a factor into a weight computes the same function, but moves the weight's effective learning
rate; a hook leaves the weight as the rules want it. Hooks belong to the modules, so that FSDP2,
DeepSpeed and activation checkpointing keep them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from megatron_completedp.core.roles import Module
from megatron_completedp.errors import ConfigError
from megatron_completedp.plan.run_plan import Plan
from megatron_completedp.torch_engine.role_map import RoleMap


@dataclass(frozen=True)
class ScaleOutput:
    """A forward hook: output -> factor * output."""

    factor: float

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """Scale the output; the signature is that of torch's forward hooks."""
        return output * self.factor


def apply_multipliers(model: nn.Module, role_map: RoleMap, plan: Plan) -> None:
    """Put the plan's residual multipliers, logit multiplier and softmax scale into `model`.

        h      <- h + multiplier * F(norm(h))      on the output of o and of down
        logits <- logit_multiplier * logits        on the output of the unembedding
        scores <- softmax_scale * q k^T            on q after its norm (RoPE is linear)

    Call it once, before the model is wrapped or sharded. The model must scale its scores by
    1/sqrt(head_dim) and its branches by 1 on its own, as those of the shipped role maps do. A fused
    loss that reads the unembedding's weight past its module also passes by the logit multiplier;
    completedp has none.

    Raises ConfigError when multipliers were applied before, or a module is not in the model.
    """
    for name, factor in output_factors(role_map, plan).items():
        module = _module(model, name)
        if _factor_of(module) != 1:
            raise ConfigError(
                f"{name} already has a multiplier of {_factor_of(module):g}, and another one would "
                "multiply with it. Call apply_multipliers once, on a fresh model."
            )
        if factor != 1:
            module.register_forward_hook(ScaleOutput(factor))


def check_multipliers(model: nn.Module, role_map: RoleMap, plan: Plan) -> None:
    """Raise ConfigError unless `model` has exactly the multipliers of `plan`."""
    for name, factor in output_factors(role_map, plan).items():
        found = _factor_of(_module(model, name))
        if found != factor:
            raise ConfigError(
                f"the output of {name} is multiplied by {found:g}; the plan's multiplier is "
                f"{factor:g}. Hyperparameters without multipliers are half a parametrization: call "
                "apply_multipliers(model, role_map, plan) first."
            )


def output_factors(role_map: RoleMap, plan: Plan) -> dict[str, float]:
    """The factor on the output of each module that may have one, by the module's name."""
    resolved, shape = plan.resolved, plan.config.model
    softmax = 1.0
    if shape.softmax_scale is not None:
        softmax = shape.softmax_scale * math.sqrt(shape.head_dim)
    query = Module.Q_NORM if Module.Q_NORM in role_map.names else Module.Q
    factors: dict[str, float] = {}
    for entry in resolved.residual:
        for module, factor in (
            (query, softmax),
            (Module.O, entry.attention),
            (Module.DOWN, entry.mlp),
        ):
            factors[role_map.names[module].format(layer=entry.layer)] = factor
    factors[role_map.names[Module.UNEMBEDDING]] = resolved.logit_multiplier
    return {name.removesuffix(".weight"): factor for name, factor in factors.items()}


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ConfigError(
            f"the model has no module {name} ({error}). Use the role map of its class, and the "
            "bare model, before DDP or DeepSpeed wrap it."
        ) from error


def _factor_of(module: nn.Module) -> float:
    hooks = module._forward_hooks.values()
    return math.prod(hook.factor for hook in hooks if isinstance(hook, ScaleOutput))
