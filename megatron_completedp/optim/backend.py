"""What a backend of PerModuleAdamW is given: the tensors of one step, and how to run it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from megatron_completedp.optim.segments import AdamWValues


class AdamWTensors(NamedTuple):
    """One parameter's four tensors: contiguous, of the same shape, never empty."""

    param: Tensor
    """float32."""
    grad: Tensor
    exp_avg: Tensor
    """float32, like exp_avg_sq."""
    exp_avg_sq: Tensor


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """The numbers of one step that all segments share."""

    step: int
    """From 1: the exponent of the bias corrections."""
    lr_fraction: float
    """Every segment's learning rate is this fraction of its own peak."""
    grad_scale: float
    """Factor on every gradient."""


class Backend(Protocol):
    """Updates the tensors it was made for; built from their segments, in the same order."""

    def step(
        self, tensors: Sequence[AdamWTensors], table: Sequence[AdamWValues], inputs: StepInputs
    ) -> None:
        """Update param, exp_avg and exp_avg_sq of all `tensors` in place."""

    def release_gradients(self) -> None:
        """Let go of the last step's gradients, if any are held; the next step brings its own."""
