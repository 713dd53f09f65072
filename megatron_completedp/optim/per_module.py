"""AdamW whose hyperparameters belong to element ranges, at the cost of plain AdamW.

q, k and v share one fused weight, so parameter groups cannot tell them apart; and one group for
each module of each layer would cost hundreds of launches. Here all tensors are in one group, and a
table of values plus a map from elements to rows of it say how each element trains.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_completedp.errors import ClassificationError, ConfigError
from megatron_completedp.optim.backend import AdamWTensors, Backend, StepInputs
from megatron_completedp.optim.flat import FlatAdamW
from megatron_completedp.optim.segments import AdamWValues, Segment, check_cover


class PerModuleAdamW(torch.optim.Optimizer):
    """theta <- theta - lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * theta), by element range.

    Constructor and state have the layout of Apex's FusedAdam, which Megatron's checkpoints expect:
    `step` in the parameter group, exp_avg and exp_avg_sq in the state of each parameter. There is
    one group, and its `lr` is no learning rate but the schedule's fraction, in [0, 1], of every
    segment's own peak. The values are not in the group, so no checkpoint can exchange them.

    Attributes:
        grad_scale: factor on every gradient in the next step alone; step() sets it back to 1.
            Clipping through it saves a pass over memory. After such a step the CPU backend leaves
            the scaled gradients in .grad and the CUDA backend the unscaled ones; read .grad before.

    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float = 1.0,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        bias_correction: bool = True,
        capturable: bool = False,
    ) -> None:
        """Hold `params`; `assign` must follow before the first step.

        Megatron passes `weight_decay`, `betas` and `eps` to every Adam; they stand in the group for
        its readers and no step uses them.

        Raises ConfigError for more than one group, for Adam with L2 regularisation, without bias
        correction, and inside CUDA graphs.
        """
        if capturable or not (adam_w_mode and bias_correction):
            raise ConfigError(
                f"PerModuleAdamW was asked for adam_w_mode={adam_w_mode}, bias_correction="
                f"{bias_correction}, capturable={capturable}; it has decoupled weight decay and "
                "bias correction, outside CUDA graphs. Set decoupled_weight_decay on and "
                "optimizer_cuda_graph off."
            )
        defaults = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        super().__init__(params, defaults)
        if len(self.param_groups) != 1:
            raise ConfigError(
                f"PerModuleAdamW was given {len(self.param_groups)} parameter groups; expected 1. "
                "Hyperparameters go into assign(), so build the groups without overrides."
            )
        self.grad_scale = 1.0
        self._table: tuple[AdamWValues, ...] = ()
        self._segments: dict[Tensor, tuple[Segment, ...]] = {}
        self._held: list[Tensor] | None = None
        self._backend: Backend | None = None

    @property
    def table(self) -> tuple[AdamWValues, ...]:
        """The sets of values that `assign` was given; empty before."""
        return self._table

    @property
    def segments(self) -> Mapping[Tensor, tuple[Segment, ...]]:
        """For every tensor that is not empty, its segments as `assign` was given them."""
        return self._segments

    def assign(
        self, table: Sequence[AdamWValues], segments: Mapping[Tensor, Sequence[Segment]]
    ) -> None:
        """Say how every element trains. Call it once Megatron's wrappers have replaced the params.

        Args:
            table: the sets of values; segments refer to them by index.
            segments: for every tensor this optimizer holds, every element once, in order. Empty
                tensors may be left out.

        Raises:
            ClassificationError: a tensor lacks segments or is not held here, or its segments leave
                a gap, overlap or refer to no row of the table.
            ConfigError: a tensor is not contiguous float32, or two are on different devices.

        """
        params: list[Tensor] = self.param_groups[0]["params"]
        strangers = len(set(segments) - set(params))
        if strangers:
            raise ClassificationError(
                f"assign() was given segments of {strangers} tensors that this optimizer does not "
                "hold. Call it after Megatron has built its optimizer, with the tensors in "
                "param_groups."
            )
        held = [param for param in params if param.numel()]
        for param in held:
            _check_tensor(param, segments.get(param, ()), len(table))
        devices = {param.device for param in held}
        if len(devices) > 1:
            raise ConfigError(
                f"parameters are on {', '.join(sorted(map(str, devices)))}; expected one device. "
                "Move the model to it before building the optimizer."
            )
        self._table = tuple(table)
        self._segments = {param: tuple(segments[param]) for param in held}
        self._held = held
        if held:
            self._backend = _backend(devices.pop(), list(self._segments.values()))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter; the step count moves on a rank without any, too.

        Raises ClassificationError before `assign` or when the held tensors were replaced after it,
        ConfigError when a gradient is missing or of a kind the backend does not take, or when
        `grad_scale` is not a positive number.
        """
        group = self.param_groups[0]
        held = self._check_held(group["params"])
        scale = self.grad_scale
        if not 0 < scale < math.inf:
            raise ConfigError(f"grad_scale is {scale}; expected a positive number.")
        tensors = [self._tensors(param) for param in held]
        group["step"] = group.get("step", 0) + 1
        if self._backend is not None:
            inputs = StepInputs(step=group["step"], lr_fraction=group["lr"], grad_scale=scale)
            self._backend.step(tensors, self._table, inputs)
        self.grad_scale = 1.0

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Torch's zero_grad; no gradient's memory is held here afterwards.

        A step keeps views of its gradients, because Megatron's gradients are in the same buffers in
        every step. Gradients that are dropped in another way stay alive until the next step.
        """
        super().zero_grad(set_to_none)
        if self._backend is not None:
            self._backend.release_gradients()

    def _check_held(self, params: Sequence[Tensor]) -> list[Tensor]:
        held = self._held
        if held is None:
            raise ClassificationError(
                "PerModuleAdamW.step() came before assign(), so no element has hyperparameters. "
                "Call assign() after Megatron has built its optimizer."
            )
        present = [param for param in params if param.numel()]
        if len(present) != len(held) or not all(map(operator.is_, present, held)):
            raise ClassificationError(
                "the tensors in param_groups were replaced after assign(), so their elements have "
                "no hyperparameters. Call assign() after Megatron has built its optimizer."
            )
        return held

    def _tensors(self, param: Tensor) -> AdamWTensors:
        grad = param.grad
        if grad is None or not grad.is_contiguous():
            raise ConfigError(
                f"a parameter of shape {tuple(param.shape)} has "
                f"{'no gradient' if grad is None else 'a gradient that is not contiguous'}; all "
                "parameters share one step count, so each needs a contiguous one in every step. "
                "Freeze a parameter by leaving it out of the optimizer."
            )
        state = self.state[param]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        return AdamWTensors(param, grad, state["exp_avg"], state["exp_avg_sq"])


def _check_tensor(param: Tensor, segments: Sequence[Segment], sets: int) -> None:
    what = f"a parameter of shape {tuple(param.shape)}"
    if param.dtype is not torch.float32 or not param.is_contiguous():
        raise ConfigError(
            f"{what} is {param.dtype} with strides {param.stride()}; expected contiguous float32. "
            "Weights in bfloat16 need float32 masters; train with precision: bf16, which has them."
        )
    check_cover(segments, param.numel(), what)
    wrong = [segment.values for segment in segments if not 0 <= segment.values < sets]
    if wrong:
        raise ClassificationError(
            f"{what}: a segment refers to values {wrong[0]} of a table of {sets}. Give it an index "
            "into the table."
        )


def _backend(device: torch.device, segments: Sequence[Sequence[Segment]]) -> Backend:
    if device.type in ("cpu", "meta"):  # on meta, a dry run assigns and never steps
        return FlatAdamW(segments)
    try:
        # Only here, because CPU installations of torch come without triton.
        from megatron_completedp.optim.triton_adamw import TritonAdamW
    except ImportError as error:
        raise ConfigError(
            f"the optimizer on {device} needs triton, and importing it failed: {error}. Install "
            "the CUDA build of torch, which brings it."
        ) from error
    return TritonAdamW(segments, device)
