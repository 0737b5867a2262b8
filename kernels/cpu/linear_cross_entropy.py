"""`linear_cross_entropy` on a CPU: gradients with the loss, chunk by chunk of rows, while the logits are in the cache.

With σ = sigmoid(2z/c) the softcap is tanh(z/c) = 2σ − 1, and a logit 2cσ − c, between −c and c: its exponential needs
no maximum.

    loss = log Σ e^(2cσ − c) − (2cσ[target] − c);  dz = (softmax − onehot)·4σ(1 − σ) / count

A sigmoid takes a tenth of the time of a tanh here, and exp2 a quarter of an exp's (bench/LOG.md, 2026-11-30).
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOG2_E = 1 / math.log(2)
CHUNK = 2**20  # logits at once: 4 MiB of fp32 each for σ and its exponential


def _chunks(x: Tensor, weight: Tensor, targets: Tensor, ignored: int):
    """Of each chunk: its rows of x, their targets (0 where they do not count), and which of them count."""
    rows = max(64, CHUNK // weight.shape[0])
    for start in range(0, x.shape[0], rows):
        part = slice(start, start + rows)
        counts = targets[part] != ignored
        yield part, x[part], torch.where(counts, targets[part], 0).long()[:, None], counts[:, None]


def _losses(z: Tensor, target: Tensor, softcap: float, wide: torch.dtype) -> tuple[Tensor, ...]:
    """σ, e^(2cσ − c), its sums and the losses, of z [rows, V]."""
    sigma = torch.mul(z.to(wide), 2 / softcap).sigmoid_()
    exp = torch.add(sigma.new_tensor(-softcap * LOG2_E), sigma, alpha=2 * softcap * LOG2_E).exp2_()
    total = exp.sum(-1, keepdim=True)
    return sigma, exp, total, total.log() - softcap * (2 * sigma.gather(1, target) - 1)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, softcap, ignored, main_grad):
        rows = x.to(weight.dtype)
        wide = torch.promote_types(x.dtype, torch.float32)
        count = (targets != ignored).sum().to(wide)
        dx = torch.empty_like(rows)
        dw = torch.zeros(weight.shape, dtype=wide, device=x.device)
        loss = torch.zeros((), dtype=wide, device=x.device)
        for part, some, target, counts in _chunks(rows, weight, targets, ignored):
            sigma, exp, total, losses = _losses(torch.mm(some, weight.mT), target, softcap, wide)
            loss += (losses * counts).sum()
            scale = counts * (4 / count)  # dz/dσ's 4, and the mean
            exp *= scale / total
            exp.scatter_add_(1, target, -scale)
            dz = exp.mul_(torch.addcmul(sigma, sigma, sigma, value=-1)).to(weight.dtype)
            torch.mm(dz, weight, out=dx[part])
            dw += torch.mm(dz.mT, some)
        ctx.save_for_backward(dx, dw)
        ctx.main_grad, ctx.dtypes = main_grad, (x.dtype, weight.dtype)
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
        return dx.to(x_dtype) * dloss, dw, None, None, None, None


def linear_cross_entropy_cpu(x: Tensor, weight: Tensor, targets: Tensor, softcap: float, ignored: int) -> Tensor:
    """The mean of `linear_cross_entropy`, with gradients; x may be wider than the weight."""
    return _LinearCrossEntropy.apply(x, weight, targets, softcap, ignored, getattr(weight, "main_grad", None))


@torch.no_grad()
def token_losses_cpu(x: Tensor, weight: Tensor, targets: Tensor, softcap: float, ignored: int) -> Tensor:
    """A loss a token, 0 where it does not count; without gradients."""
    rows, wide = x.to(weight.dtype), torch.promote_types(x.dtype, torch.float32)
    parts = []
    for _, some, target, counts in _chunks(rows, weight, targets, ignored):
        *_, losses = _losses(torch.mm(some, weight.mT), target, softcap, wide)
        parts.append((losses * counts)[:, 0])
    return torch.cat(parts)
