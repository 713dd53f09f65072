"""Whether Transformer Engine really works here, and hiding it from Megatron when it does not.

The `transformer-engine` package from PyPI installs without its compiled part and then raises
RuntimeError on import. Megatron-Core guards its import against ImportError alone, so an unusable
install would make `import megatron.core` fail. Nothing here imports torch unless Transformer Engine
is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class TransformerEngineStatus:
    """Outcome of the probe."""

    usable: bool
    reason: str
    """One clause for the log."""


@cache
def probe() -> TransformerEngineStatus:
    """Import `transformer_engine.pytorch` once and say what came of it."""
    if importlib.util.find_spec("transformer_engine") is None:
        return TransformerEngineStatus(False, "Transformer Engine is not installed")
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # a broken install raises RuntimeError, OSError or ImportError
        return TransformerEngineStatus(
            False, f"Transformer Engine is installed but cannot be imported ({error!r})"
        )
    return TransformerEngineStatus(True, "Transformer Engine can be imported")


def hide_if_broken() -> None:
    """Make `import transformer_engine` raise ImportError when the install is unusable."""
    if not probe().usable:
        # None in sys.modules is Python's own way to say "this import fails with ImportError".
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]
