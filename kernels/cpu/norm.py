"""`rms_norm` on a CPU, always in fp32 or wider: few passes, and sums of products by BLAS."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common import EPS, upcast


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, x0, lambda_r, lambda_0, main_grad_r, main_grad_0):
        ctx.set_materialize_grads(False)
        x = upcast(x)
        s = x
        if x0 is not None:
            x0 = upcast(x0)
            s = (x * lambda_r).addcmul_(x0, lambda_0)
        rstd = torch.linalg.vector_norm(s, dim=-1, keepdim=True).square_().div_(s.shape[-1]).add_(EPS).rsqrt_()
        y = s * rstd
        ctx.save_for_backward(y, rstd, *((x, x0, lambda_r, lambda_0) if x0 is not None else ()))
        ctx.main_grads = main_grad_r, main_grad_0
        if x0 is None:
            return s.view_as(s), y
        return s, y, x0.view_as(x0)

    @staticmethod
    @once_differentiable
    def backward(ctx, ds, dy, dx0_later=None):
        y, rstd, *mixed = ctx.saved_tensors
        g = ds
        if dy is not None:
            mean = torch.linalg.vecdot(dy, y).unsqueeze(-1).div_(y.shape[-1])
            g = torch.addcmul(dy, y, mean, value=-1).mul_(rstd)
            if ds is not None:
                g += ds
        if not mixed:
            return g, *(None,) * 5
        x, x0, lambda_r, lambda_0 = mixed
        g = torch.zeros_like(x) if g is None else g
        dx, dx0 = g * lambda_r, g * lambda_0
        if dx0_later is not None:
            dx0 += dx0_later
        grads = []
        for of, main_grad in zip((x, x0), ctx.main_grads, strict=True):
            grad = torch.dot(g.reshape(-1), of.reshape(-1))
            grads.append(grad if main_grad is None else None)
            if main_grad is not None:
                main_grad.add_(grad)
        return dx, dx0, *grads, None, None


def rms_norm_cpu(
    x: Tensor, x0: Tensor | None = None, lambda_r: Tensor | None = None, lambda_0: Tensor | None = None
) -> tuple[Tensor, ...]:
    """`rms_norm`, whose results are in fp32 or wider whatever its inputs are."""
    main_grads = getattr(lambda_r, "main_grad", None), getattr(lambda_0, "main_grad", None)
    return _RMSNorm.apply(x, x0, lambda_r, lambda_0, *main_grads)
