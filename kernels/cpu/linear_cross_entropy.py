"""`linear_cross_entropy` on a CPU: the gradients with the loss, and few passes over the logits.

With σ = sigmoid(2z/c) the softcap is tanh(z/c) = 2σ − 1, and a logit 2cσ − c, between −c and c: its exponential e needs
no maximum. With S = Σ e a row:

    loss = log S − (2cσ[target] − c);  dz = (e − S·onehot)·σ(1 − σ)·r,  r = 4 / (S·count)

What is the same for all of a row waits for the narrow ends: 2/c is multiplied into x before the product, r into x and
dx after it. A sigmoid takes a tenth of a tanh's time here, and exp2 a quarter of an exp's (bench/LOG.md, 2026-11-30).
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOG2_E = 1 / math.log(2)
CHUNK = 2**24  # logits that are there at once, in the dtype of the weight
PART = 2**20  # of these in fp32: σ and e


def _rows(logits: int, vocab_size: int) -> int:
    return max(64, logits // vocab_size)


def _parts(x: Tensor, logits: int, vocab_size: int) -> Iterator[slice]:
    rows = _rows(logits, vocab_size)
    for start in range(0, x.shape[0], rows):
        yield slice(start, start + rows)


def _buffers(x: Tensor, weight: Tensor) -> Tensor:
    """For σ and e of a part: made anew for each, they would not be in the cache."""
    rows = min(x.shape[0], _rows(PART, weight.shape[0]))
    return x.new_empty(2, rows, weight.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))


def _losses(z: Tensor, targets: Tensor, softcap: float, ignored: int, buffers: Tensor) -> tuple[Tensor, ...]:
    """Of z = 2/c of the products, [rows, V]: losses, 0 where the target does not count; σ, e, S, and the targets and
    whether they count, [rows, 1]."""
    sigma, exp = buffers[:, : z.shape[0]]
    counts = (targets != ignored)[:, None]
    target = targets[:, None].long().where(counts, 0)
    sigma.copy_(z).sigmoid_()
    torch.add(sigma.new_tensor(-softcap * LOG2_E), sigma, alpha=2 * softcap * LOG2_E, out=exp).exp2_()
    total = exp.sum(-1, keepdim=True)
    losses = total.log() - softcap * (2 * sigma.gather(1, target) - 1)
    return losses * counts, sigma, exp, total, target, counts


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, softcap, ignored, main_grad):
        V, wide = weight.shape[0], torch.promote_types(x.dtype, torch.float32)
        x, x_dtype = x * (2 / softcap), x.dtype
        count = (targets != ignored).sum().to(wide)
        buffers = _buffers(x, weight)
        dx = torch.empty_like(x, dtype=wide)
        dw = torch.zeros(weight.shape, dtype=wide, device=x.device)
        loss = torch.zeros((), dtype=wide, device=x.device)
        for chunk in _parts(x, CHUNK, V):
            some, its_targets = x[chunk], targets[chunk]
            z = torch.mm(some.to(weight.dtype), weight.mT)
            factor = z.new_empty(z.shape[0], 1, dtype=wide)
            for part in _parts(z, PART, V):
                losses, sigma, exp, total, target, counts = _losses(
                    z[part], its_targets[part], softcap, ignored, buffers
                )
                loss += losses.sum()
                factor[part] = counts * (4 / count) / total
                exp.scatter_add_(1, target, -total)
                z[part] = exp.mul_(sigma.addcmul_(sigma, sigma, value=-1))
            dx[chunk] = torch.mm(z, weight) * factor
            dw += torch.mm(z.mT, (some * factor).to(weight.dtype))
        ctx.save_for_backward(dx, dw.mul_(softcap / 2))
        ctx.main_grad, ctx.dtypes = main_grad, (x_dtype, weight.dtype)
        return loss / count

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        dx, dw = ctx.saved_tensors
        x_dtype, w_dtype = ctx.dtypes
        if ctx.main_grad is not None:
            ctx.main_grad.addcmul_(dw, dloss)
            dw = None
        else:
            dw = (dw * dloss).to(w_dtype)
        return (dx * dloss).to(x_dtype), dw, None, None, None, None


def linear_cross_entropy_cpu(x: Tensor, weight: Tensor, targets: Tensor, softcap: float, ignored: int) -> Tensor:
    """The mean of `linear_cross_entropy`, with gradients; x may be wider than the weight."""
    return _LinearCrossEntropy.apply(x, weight, targets, softcap, ignored, getattr(weight, "main_grad", None))


@torch.no_grad()
def token_losses_cpu(x: Tensor, weight: Tensor, targets: Tensor, softcap: float, ignored: int) -> Tensor:
    """A loss a token, 0 where it does not count; without gradients."""
    buffers, found = _buffers(x, weight), []
    x = (x * (2 / softcap)).to(weight.dtype)
    for part in _parts(x, PART, weight.shape[0]):
        losses, *_ = _losses(torch.mm(x[part], weight.mT), targets[part], softcap, ignored, buffers)
        found.append(losses[:, 0])
    return torch.cat(found)
