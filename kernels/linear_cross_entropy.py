"""The head and its loss, in one: z = x·Wᵀ, logits = c·tanh(z/c), loss = logsumexp(logits) − logits[target].

The softcap c keeps every logit within ±c; softmax and loss are taken in fp32. Source of the softcap: Gemma 2,
arXiv 2408.00118.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import upcast

SOFTCAP = 15.0


def softcapped_logits(x: Tensor, weight: Tensor, softcap: float = SOFTCAP) -> Tensor:
    """x: [..., D]; weight: [V, D]. Returns [..., V] in fp32 or wider: for sampling, where one row is wanted."""
    return softcap * torch.tanh(upcast(F.linear(x, weight)) / softcap)


def linear_cross_entropy_ref(
    x: Tensor, weight: Tensor, targets: Tensor, softcap: float = SOFTCAP, reduction: str = "mean"
) -> Tensor:
    return F.cross_entropy(softcapped_logits(x, weight, softcap), targets.long(), reduction=reduction)


def _chunk_rows(vocab_size: int, device: torch.device) -> int:
    # On a CPU a chunk of fp32 logits should stay in the last-level cache: 4 MiB is 3 times as fast as all rows at once
    # (bench/LOG.md, 2026-11-23). On a GPU it only has to be large enough to fill the device.
    elements = 2**20 if device.type == "cpu" else 2**28
    return max(64, elements // vocab_size)


class _ChunkedMean(torch.autograd.Function):
    """The mean loss, chunk by chunk. The reference's own autograd takes each chunk's gradient as soon as its loss is
    there, so logits of more than one chunk never exist. Saved for backward: dx [N, D] and dweight [V, D]."""

    @staticmethod
    def forward(ctx, x, weight, targets, softcap):
        weight = weight.detach().requires_grad_()
        dx = torch.empty_like(x)
        total = 0.0
        rows = _chunk_rows(weight.shape[0], x.device)
        for part, targets_part, dx_part in zip(x.split(rows), targets.split(rows), dx.split(rows), strict=True):
            with torch.enable_grad():
                part = part.detach().requires_grad_()
                loss = linear_cross_entropy_ref(part, weight, targets_part, softcap, "sum") / x.shape[0]
            loss.backward()
            dx_part.copy_(part.grad)
            total = total + loss.detach()
        ctx.save_for_backward(dx, weight.grad)
        return total

    @staticmethod
    def backward(ctx, dloss):
        dx, dweight = ctx.saved_tensors
        return dx * dloss, dweight * dloss, None, None


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, softcap: float = SOFTCAP, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy of a softcapped linear head, in nats.

    Args:
        x: [N, D]; weight: [V, D]; targets: [N], integers in [0, V).
        reduction: "mean" over the N tokens, or "none" for one loss a token (evaluation; chunked where no gradient
            is asked for).

    Returns:
        a scalar or [N], in fp32 (fp64 where the inputs are).
    """
    if torch.is_grad_enabled():
        if reduction == "mean":
            return _ChunkedMean.apply(x, weight, targets, softcap)
        return linear_cross_entropy_ref(x, weight, targets, softcap, reduction)
    rows = _chunk_rows(weight.shape[0], x.device)
    losses = [
        linear_cross_entropy_ref(part, weight, targets_part, softcap, "none")
        for part, targets_part in zip(x.split(rows), targets.split(rows), strict=True)
    ]
    losses = torch.cat(losses)
    return losses.mean() if reduction == "mean" else losses
