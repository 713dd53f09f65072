"""Which of NVIDIA's kernel packages really work here, and hiding the others from Megatron.

Both have a trap on PyPI. `transformer-engine` installs there without its compiled part and raises
RuntimeError on import; `apex` is another project, which need not even be importable today.
Megatron-Core guards its imports against ImportError alone, so either would make `import
megatron.core` fail. So a broken one is hidden. On CPU, where nobody misses it, the log says so; on
CUDA it is an error: whoever installed it wants its speed. Nothing here imports torch unless one of
them is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from functools import cache
from typing import Literal

from megatron_completedp.errors import LaunchError


@dataclass(frozen=True)
class PackageStatus:
    """Outcome of a probe."""

    state: Literal["absent", "broken", "usable"]
    reason: str
    """One clause for the log."""

    @property
    def usable(self) -> bool:
        """Whether Megatron can use it."""
        return self.state == "usable"


@cache
def probe_transformer_engine() -> PackageStatus:
    """Import `transformer_engine.pytorch` once and say what came of it."""
    if importlib.util.find_spec("transformer_engine") is None:
        return PackageStatus("absent", "Transformer Engine is not installed")
    error = _error_of_importing("transformer_engine.pytorch")
    if error is None:
        return PackageStatus("usable", "Transformer Engine can be imported")
    return PackageStatus(
        "broken",
        f"Transformer Engine is installed but cannot be imported ({error!r}; plain "
        "transformer-engine from PyPI lacks the compiled part: install "
        "transformer-engine[pytorch], which needs nvcc, or uninstall it)",
    )


@cache
def probe_apex() -> PackageStatus:
    """Import the parts of Apex that Megatron takes gradient norms with, and say what came of it."""
    if importlib.util.find_spec("apex") is None:
        return PackageStatus("absent", "Apex is not installed")
    error = _error_of_importing("apex.multi_tensor_apply")
    if error is not None:
        return PackageStatus(
            "broken",
            f"the installed apex has no usable multi_tensor_apply ({error!r}; PyPI's apex is a web "
            "toolkit and not NVIDIA's: uninstall it, or build github.com/NVIDIA/apex)",
        )
    error = _error_of_importing("amp_C")
    if error is not None:
        return PackageStatus(
            "broken",
            f"Apex is installed without its CUDA extensions ({error!r}; build it with --cpp_ext "
            "and --cuda_ext, or uninstall it)",
        )
    return PackageStatus("usable", "Apex and its CUDA extensions can be imported")


_PROBES = {"transformer_engine": probe_transformer_engine, "apex": probe_apex}


def hide_unusable() -> None:
    """Make the import of a package that is absent or broken raise ImportError."""
    for name, probe in _PROBES.items():
        if not probe().usable:
            # None in sys.modules is Python's own way to say "this import fails with ImportError".
            sys.modules[name] = None  # type: ignore[assignment]


def refuse_broken() -> None:
    """Raise LaunchError for a package that is installed but broken, with the way out."""
    for probe in _PROBES.values():
        status = probe()
        if status.state == "broken":
            raise LaunchError(status.reason)


def _error_of_importing(name: str) -> BaseException | None:
    try:
        importlib.import_module(name)
    except Exception as error:  # a broken install raises anything, RuntimeError and SyntaxError too
        return error
    return None
