"""The fused loss against the same formula in plain PyTorch operations, on a whole vocabulary."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from megatron_completedp.mcore.loss import cross_entropy_with_z_loss


def logits_and_labels(dtype: torch.dtype, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(7, 3, 50, generator=generator)
    labels = torch.randint(50, (7, 3), generator=generator)
    return logits.to(dtype).requires_grad_(), labels


def plain(logits: Tensor, labels: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    wide = logits.double()
    cross_entropy = F.cross_entropy(wide.flatten(0, 1), labels.flatten(), reduction="none")
    log_z = torch.logsumexp(wide, dim=-1)
    return cross_entropy.view_as(labels) + z_loss * log_z.square(), cross_entropy.view_as(labels)


# fp32 against fp64: a few roundings of 6e-8 on values of size 10. bf16 logits enter both sides
# rounded alike, so the losses agree as in fp32; only the gradient is rounded to bf16, 2^-9.
@pytest.mark.parametrize(
    ("dtype", "grad_tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 4e-3)]
)
@pytest.mark.parametrize("z_loss", [0.0, 1e-4, 0.1])
def test_loss_and_gradient(dtype: torch.dtype, grad_tolerance: float, z_loss: float) -> None:
    logits, labels = logits_and_labels(dtype)
    weights = torch.linspace(0.5, 2, labels.numel()).view_as(labels)  # a gradient per token
    loss, cross_entropy = cross_entropy_with_z_loss(logits, labels, z_loss)
    (loss * weights).sum().backward()
    expected, expected_ce = plain(logits, labels, z_loss)
    (expected_grad,) = torch.autograd.grad((expected * weights).sum(), logits)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(cross_entropy.double(), expected_ce, rtol=2e-6, atol=2e-6)
    assert not cross_entropy.requires_grad
    assert logits.grad is not None
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad, expected_grad, rtol=grad_tolerance, atol=grad_tolerance)


def test_gradient_equals_finite_differences() -> None:
    logits, labels = logits_and_labels(torch.float32)
    loss, _ = cross_entropy_with_z_loss(logits, labels, 0.1)
    loss.sum().backward()
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    step = 1e-2
    with torch.no_grad():
        above, _ = cross_entropy_with_z_loss(logits + step * direction, labels, 0.1)
        below, _ = cross_entropy_with_z_loss(logits - step * direction, labels, 0.1)
    slope = (above.double() - below.double()).sum().item() / (2 * step)
    # Truncation is step^2 = 1e-4 relative, rounding 1e-6 * 10 / step = 1e-3.
    assert (logits.grad * direction).sum().item() == pytest.approx(slope, rel=3e-3)


def test_large_logits_do_not_overflow() -> None:
    logits, labels = logits_and_labels(torch.float32, scale=1e4)
    loss, _ = cross_entropy_with_z_loss(logits, labels, 1e-4)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logits.grad.isfinite().all()


def test_logits_survive_and_backward_may_run_twice() -> None:
    # Megatron's own helper works in place on fp32 logits; this one must not.
    logits, labels = logits_and_labels(torch.float32)
    before = logits.detach().clone()
    loss, _ = cross_entropy_with_z_loss(logits, labels, 0.1)
    (first,) = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss.sum(), logits)
    assert torch.equal(logits, before)
    assert torch.equal(first, second)


def test_negative_control_z_loss_moves_the_gradient() -> None:
    logits, labels = logits_and_labels(torch.float32)
    with_z, _ = cross_entropy_with_z_loss(logits, labels, 1e-2)
    without, _ = cross_entropy_with_z_loss(logits, labels, 0.0)
    (a,) = torch.autograd.grad(with_z.sum(), logits)
    (b,) = torch.autograd.grad(without.sum(), logits)
    assert (a - b).abs().max() > 1e-3
