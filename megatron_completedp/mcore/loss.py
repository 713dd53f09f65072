"""Cross entropy with z-loss over a vocabulary that is split across the tensor-parallel group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def cross_entropy_with_z_loss(
    logits: Tensor, labels: Tensor, z_loss: float, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """Per-token training loss and plain cross entropy.

        log Z = log sum_v exp(logits_v)
        cross_entropy = log Z - logits_label
        loss = cross_entropy + z_loss * (log Z)^2

    Args:
        logits: [..., V / TP], this rank's slice of the vocabulary, fp32 or bf16.
        labels: [...], token ids over the whole vocabulary, the same on every rank of `group`.
        z_loss: weight of the z-loss; 0 leaves it out.
        group: the tensor-parallel group; None where the vocabulary is whole.

    Returns:
        (loss, cross_entropy), both [...] in fp32 and equal on all ranks. Only the loss has a
        gradient; the cross entropy is for reports.
    """
    loss, cross_entropy = _CrossEntropyWithZLoss.apply(logits, labels, z_loss, group)
    return loss, cross_entropy


class _CrossEntropyWithZLoss(torch.autograd.Function):
    """One fused pass over the logits forward, two backward; memory: one fp32 copy of the logits.

    log_softmax is the fastest kernel that yields both results: log Z is the label's logit minus its
    log-probability. A slice of the vocabulary normalizes by its own Z_local; what is missing is a
    factor Z_local / Z per token, which joins the other per-token factors in the backward pass. So
    tensor parallelism adds two all-reduces of a few numbers per token and no pass over the logits.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, z_loss: float, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor]:
        log_probs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
        if group is None or group.size() == 1:
            owned, index = None, labels.unsqueeze(-1)
        else:
            local = labels - group.rank() * logits.size(-1)
            owned = (local >= 0) & (local < logits.size(-1))
            index = local.where(owned, 0).unsqueeze(-1)  # any entry of the slice gives Z_local
        label_logit = logits.gather(-1, index).squeeze(-1).float()
        log_z = label_logit - log_probs.gather(-1, index).squeeze(-1)
        share = None
        if group is not None and owned is not None:
            local_log_z = log_z
            log_z, label_logit = _reduce(local_log_z, label_logit * owned, group)
            share = torch.exp(local_log_z - log_z)
        cross_entropy = log_z - label_logit
        ctx.save_for_backward(log_probs, index, log_z, owned, share)
        ctx.z_loss, ctx.dtype = z_loss, logits.dtype
        ctx.mark_non_differentiable(cross_entropy)
        if z_loss == 0:
            # A second output must not be the same tensor as the first.
            return cross_entropy.clone(), cross_entropy
        return torch.addcmul(cross_entropy, log_z, log_z, value=z_loss), cross_entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        """Gradient of logit_v: p_v (1 + 2 z_loss log Z) - [v = label], times the incoming grad."""
        log_probs, index, log_z, owned, share = ctx.saved_tensors
        factor = grad * (1 + 2 * ctx.z_loss * log_z)
        label_grad = -grad
        if share is not None:
            factor, label_grad = factor * share, label_grad * owned
        grad_logits = torch.exp(log_probs).mul_(factor.unsqueeze(-1))
        grad_logits.scatter_add_(-1, index, label_grad.unsqueeze(-1))
        return grad_logits.to(ctx.dtype), None, None, None


def _reduce(log_z: Tensor, label_logit: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Sum Z and the label's logit over the group; log_z and label_logit are this rank's part.

    Z is summed relative to its largest term so that nothing overflows; only the rank that owns the
    label contributes a logit.
    """
    largest = log_z.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    sums = torch.stack([torch.exp(log_z - largest), label_logit])
    dist.all_reduce(sums, group=group)
    return largest + torch.log(sums[0]), sums[1]
