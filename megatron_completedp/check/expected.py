"""What the rules say about slopes: log RMS against log width or log depth.

Derived from sizes of gradients and sums, as `core.tables` outlines, not read off the table: a wrong
table must not match.
"""

from __future__ import annotations

from typing import NamedTuple

from megatron_completedp.core.roles import OUTSIDE_STACK, Module
from megatron_completedp.core.tables import Parametrization
from megatron_completedp.study.sizes import Axis

_BRANCHES = ("attention_branch", "mlp_branch")
_OUTSIDE = frozenset(module.value for module in OUTSIDE_STACK) | {"logits"}
_QK_GAINS = (Module.Q_NORM, Module.K_NORM)


class Band(NamedTuple):
    """The slopes that pass."""

    low: float
    high: float
    note: str = ""

    @property
    def middle(self) -> float:
        """The exponent that the band is around."""
        return (self.low + self.high) / 2


def activation_at_start(name: str, axis: Axis, alpha: float) -> Band:
    """RMS at step 0: flat, as all sums of random terms are normalized by their init."""
    if axis == "width" and name == "logits":
        # U has entries of size 1/N, so that sums of N independent terms shrink.
        return _around(-0.5, 0.1, "logits at init may shrink: N terms of size 1/N add at random")
    if axis == "depth" and name in _BRANCHES:
        return _around(-alpha, 0.1, "the residual multiplier")
    return _around(0, 0.1)


def change(name: str, axis: Axis, alpha: float) -> Band:
    """RMS of the change since step 0: flat, after step 1."""
    if axis == "width":
        return _around(0, 0.1)
    if alpha < 1:
        return _change_at_small_alpha(name, alpha)
    if name in _BRANCHES:
        return _around(-1, 0.1, "the residual multiplier")
    if name == Module.MLP_NORM:
        return Band(-0.1, 0.2, "its middle lies between two layers, and its change is no line")
    return _around(0, 0.1)


def _change_at_small_alpha(name: str, alpha: float) -> Band:
    """In depth, with alpha < 1: the network's output keeps moving, the inside of a branch less.

    A branch's own weights move it by m_L^(alpha - 1) and the stream by 1, and what is of second
    order in the two falls further.
    """
    if name in ("residual", *_OUTSIDE):
        return _around(0, 0.2, "alpha below 1: wider, as branches add at random and in common")
    low, note = alpha - 1, "between alpha - 1 (own weights) and 0 (the stream)"
    if name in _BRANCHES:
        return Band(low - alpha - 0.2, -alpha + 0.1, note)
    return Band(low - 0.2, 0.2, note)


def contribution(name: str, axis: Axis, alpha: float) -> Band:
    """RMS of what a weight's own change adds to its output: one step moves it as much at any size.

    In a branch, the 2L contributions of all layers add up to m_L^(1 - alpha) times m_L^-alpha: the
    learning rate's m_L^(alpha - 1) is what keeps that sum at one.
    """
    inside = axis == "depth" and name not in _OUTSIDE
    if inside and alpha < 1:
        note = "inputs that move less take part of the growth away"
        return Band(alpha - 1.4, alpha - 0.7, note)
    if name in _QK_GAINS:
        return _around(0, 0.3, "head_dim numbers: noisy")
    return _around(0, 0.2, "wider than a change: one weight's part of it scatters more")


def gradient(
    name: str, axis: Axis, alpha: float, parametrization: Parametrization = "completedp"
) -> Band:
    """RMS gradient: 1/N upstream of the readout, m_L^-alpha inside a branch.

    The readout's own falls with 1/N only where a multiplier divides the logits (`completep`).
    """
    if axis == "depth":
        exponent = 0 if name in _OUTSIDE else -alpha
        if name in _QK_GAINS:
            return _around(exponent, 0.4, "head_dim numbers of one layer: noisy")
        if alpha < 1:
            return _around(exponent, 0.25, "alpha below 1: wider, as the stream itself grows")
        return _around(exponent, 0.15)
    if name in _QK_GAINS:
        note = "0 if the heads' terms agree (the table's eps), -1/2 if they are independent"
        return _around(0, 0.6, note)
    flat = name == Module.UNEMBEDDING and parametrization != "completep"
    return _around(0 if flat else -1, 0.15)


def update(name: str, axis: Axis) -> Band:
    """RMS of Adam's direction with eps as large as the gradient: flat when eps scales alike."""
    if axis == "width" and name in _QK_GAINS:
        return Band(-0.45, 0.15, "the gradient falls with up to N^-1/2, which eps does not follow")
    return _around(0, 0.15)


def decay(name: str, axis: Axis, alpha: float, depth_weight_decay: str) -> Band:
    """Decay over a whole run, lr * weight_decay * steps: conserved.

    In depth only if asked for; otherwise it follows the learning rate of the branches.
    """
    falls = axis == "depth" and name not in _OUTSIDE and depth_weight_decay == "paper"
    # The optimizer's own arithmetic is exact to fp32 rounding of the weights: 1e-3 octaves.
    return _around(alpha - 1 if falls else 0, 0.02)


def _around(exponent: float, tolerance: float, note: str = "") -> Band:
    return Band(exponent - tolerance, exponent + tolerance, note)
