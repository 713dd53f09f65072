"""Run an unmodified megatron-core wheel on CPU tensors with the gloo backend.

Megatron-Core assumes CUDA in three ways, and each gets one kind of replacement, made once at
start-up and never on the hot path:

1. entry points of torch.cuda (and Tensor.cuda) that it calls unconditionally, and the kernels of
   Transformer Engine and Apex where they are installed;
2. the two functions by which its random tracker reads and writes the device's generator;
3. the literals "cuda" and "torch.cuda.*Tensor" inside some of its functions, as device arguments
   and as dtype names. No device-redirecting mode can reach the latter, so the constants are
   swapped inside the code objects of the modules listed below.

Nothing on disk changes. The replacements last for the process: it is a CPU process from then on.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from types import CodeType, FunctionType, SimpleNamespace
from typing import Any

import torch

from megatron_completedp.errors import CompletedPError

_CONSTANTS = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}

#: Modules whose constants are swapped, with what fails otherwise. Every run needs the first five.
_MODULES = {
    "megatron.core.optimizer.optimizer": "dtype names of parameters, scale tensors",
    "megatron.core.optimizer.distrib_optimizer": "dtype names of parameters",
    "megatron.core.optimizer.clip_grads": "norm buffers, dtype names of gradients",
    "megatron.core.pipeline_parallel.schedules": "the token counter",
    "megatron.core.utils": "the result of the local gradient norm",
    "megatron.core.optimizer.grad_scaler": "a static loss scale",
    "megatron.core.tensor_parallel.data": "broadcast_data",
    "megatron.core.transformer.utils": "the causal mask of Megatron's own attention",
    "megatron.core.dist_checkpointing.exchange_utils": "fully parallel loading",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver": "a cached save plan",
}

#: What Megatron takes from Transformer Engine or Apex, and its own replacement of each.
_LOCAL_NORMS = {
    "multi_tensor_applier": "local_multi_tensor_applier",
    "l2_norm_impl": "local_multi_tensor_l2_norm",
    "multi_tensor_scale_impl": "local_multi_tensor_scale",
}

_installed = False


def install() -> None:
    """Apply the replacements; later calls do nothing.

    Raises CompletedPError when a listed module has no constant left to swap, because then this
    megatron-core moved the code and would fail later, and less clearly.
    """
    global _installed
    if _installed:
        return
    _replace_cuda_entry_points()
    _replace_rng_access()
    _use_local_norms()
    for name, purpose in _MODULES.items():
        if _retarget_module(name) == 0:
            raise CompletedPError(
                f"{name} has no CUDA literal left to retarget for {purpose}: this megatron-core "
                "is unknown to the CPU platform. Use a version in >=0.16.1,<0.20."
            )
    _installed = True


def _replace_cuda_entry_points() -> None:
    cpu = torch.device("cpu")

    def nothing(*_args: object, **_kwargs: object) -> None:
        return None

    stream = SimpleNamespace(wait_stream=nothing, wait_event=nothing, synchronize=nothing)
    replacements = {
        "current_device": lambda: cpu,  # Megatron passes it on as device=...
        "synchronize": nothing,
        "current_stream": lambda device=None: stream,
        # Left alone, seeding would only be queued until CUDA starts, which is never: all states of
        # the random tracker would be equal and TP ranks would share dropout masks.
        "manual_seed": torch.manual_seed,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
    }
    for name, function in replacements.items():
        setattr(torch.cuda, name, function)
    torch.Tensor.cuda = lambda self, *_args, **_kwargs: self  # type: ignore[method-assign]


def _replace_rng_access() -> None:
    """On CPU, dropout and initialization draw from the default generator, so fork that one."""
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    replacements = {
        "_get_cuda_rng_state": lambda device=None, clone=False, graph_safe=False: (
            torch.get_rng_state()
        ),
        "_set_cuda_rng_state": lambda state, device=-1, graph_safe=False: torch.set_rng_state(
            state
        ),
    }
    for name, function in replacements.items():
        setattr(random, name, function)
    # Each fork would warn that the CPU generator changed, which here is the purpose.
    logging.getLogger(random.__name__).addFilter(
        lambda record: "CPU RNG state changed within GPU RNG context" not in record.getMessage()
    )


def _use_local_norms() -> None:
    """Sum up gradients with torch where Transformer Engine or Apex is there: theirs need CUDA."""
    utils = importlib.import_module("megatron.core.utils")
    for name in ("megatron.core.optimizer.optimizer", "megatron.core.optimizer.clip_grads"):
        module = importlib.import_module(name)
        for theirs, local in _LOCAL_NORMS.items():
            if hasattr(module, theirs):
                setattr(module, theirs, getattr(utils, local))


def _retarget_module(name: str) -> int:
    """Swap the constants in every function of module `name`; the number of functions changed."""
    changed = 0
    for function in _functions(importlib.import_module(name), name):
        code = _retarget(function.__code__)
        defaults = _retarget(function.__defaults__)
        if code is function.__code__ and defaults == function.__defaults__:
            continue
        function.__code__, function.__defaults__ = code, defaults
        changed += 1
    return changed


def _functions(namespace: Any, module: str) -> Iterator[FunctionType]:
    """Functions that `module` defines: plain, methods, properties, and what decorators wrap."""
    for member in list(vars(namespace).values()):
        if isinstance(member, property):
            accessors = (member.fget, member.fset)
            yield from (f for f in accessors if isinstance(f, FunctionType))
        elif getattr(member, "__module__", None) != module:
            continue
        elif isinstance(member, type):
            yield from _functions(member, module)
        else:
            function = getattr(member, "__func__", member)  # static and class methods
            while function is not None:
                if isinstance(function, FunctionType):
                    yield function
                function = getattr(function, "__wrapped__", None)


def _retarget(value: Any) -> Any:
    """`value` with the constants swapped, inside tuples and nested code objects too."""
    if isinstance(value, str):
        return _CONSTANTS.get(value, value)
    if isinstance(value, tuple):
        return tuple(_retarget(item) for item in value)
    if isinstance(value, CodeType):
        constants = _retarget(value.co_consts)
        return value if constants == value.co_consts else value.replace(co_consts=constants)
    return value
