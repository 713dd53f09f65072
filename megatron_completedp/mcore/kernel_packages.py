"""Which of NVIDIA's kernel packages really work here, and hiding the others from Megatron.

Both have a trap on PyPI. `transformer-engine` installs there without its compiled part and raises
RuntimeError on import; `apex` is another project, which need not even be importable today.
Megatron-Core guards its imports against ImportError alone, so either would make `import
megatron.core` fail. Nothing here imports torch unless one of them is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class PackageStatus:
    """Outcome of a probe."""

    usable: bool
    reason: str
    """One clause for the log."""


@cache
def probe_transformer_engine() -> PackageStatus:
    """Import `transformer_engine.pytorch` once and say what came of it."""
    if importlib.util.find_spec("transformer_engine") is None:
        return PackageStatus(False, "Transformer Engine is not installed")
    error = _error_of_importing("transformer_engine.pytorch")
    if error is None:
        return PackageStatus(True, "Transformer Engine can be imported")
    return PackageStatus(
        False,
        f"Transformer Engine is installed but cannot be imported ({error!r}; plain "
        "transformer-engine from PyPI lacks the compiled part: install "
        "transformer-engine[pytorch], which needs nvcc, or uninstall it)",
    )


@cache
def probe_apex() -> PackageStatus:
    """Import the parts of Apex that Megatron takes gradient norms with, and say what came of it."""
    if importlib.util.find_spec("apex") is None:
        return PackageStatus(False, "Apex is not installed")
    error = _error_of_importing("apex.multi_tensor_apply")
    if error is not None:
        return PackageStatus(
            False,
            f"the installed apex has no usable multi_tensor_apply ({error!r}; PyPI's apex is a web "
            "toolkit and not NVIDIA's: uninstall it, or build github.com/NVIDIA/apex)",
        )
    error = _error_of_importing("amp_C")
    if error is not None:
        return PackageStatus(
            False,
            f"Apex is installed without its CUDA extensions ({error!r}; build it with --cpp_ext "
            "and --cuda_ext, or uninstall it)",
        )
    return PackageStatus(True, "Apex and its CUDA extensions can be imported")


def hide_unusable() -> None:
    """Make the import of a package that is installed but unusable raise ImportError."""
    for name, probe in (
        ("transformer_engine", probe_transformer_engine),
        ("apex", probe_apex),
    ):
        if not probe().usable:
            # None in sys.modules is Python's own way to say "this import fails with ImportError".
            sys.modules[name] = None  # type: ignore[assignment]


def _error_of_importing(name: str) -> BaseException | None:
    try:
        importlib.import_module(name)
    except Exception as error:  # a broken install raises anything, RuntimeError and SyntaxError too
        return error
    return None
