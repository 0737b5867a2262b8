"""A matrix product with nothing fused but the residual: y = x·Wᵀ (+ residual).

x: [..., K], W: [N, K], y and residual: [..., N]. Backward: dx = dy·W;  dW = dyᵀ·x, added in fp32 to `W.main_grad` where
there is one;  dresidual = dy, the same tensor.

Saved: x and W. Bytes per token in 16 bits: 2(K + N) forward, and 2N more for the residual; 4(K + N) backward. FLOPs per
token: 2KN forward, 4KN backward. Where the vendor multiplies (product.py), PyTorch's `addmm` copies the residual into y
before its GEMM adds to it, which moves another 4N bytes; with `overwrite` the residual becomes y, and nothing is
copied.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .common import use_cpu_forms, use_kernels
from .cpu import linear_cpu
from .product import product
from .weight_grad import weight_grad


def linear_ref(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    y = F.linear(x, weight)
    return y if residual is None else residual + y


def _check(x: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)}: expected [..., K] and [N, K]")
    out_shape = (*x.shape[:-1], weight.shape[0])
    if residual is not None and residual.shape != out_shape:
        raise ValueError(f"residual: {tuple(residual.shape)}, expected {out_shape}")
    dtypes = {t.dtype for t in (x, weight, residual) if t is not None}
    if len(dtypes) != 1:
        raise ValueError(f"x, weight and residual must have one dtype, got {sorted(map(str, dtypes))}")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, residual, main_grad, overwrite):
        _check(x, weight, residual)
        N, K = weight.shape
        rows = x.reshape(-1, K)
        stream = None if residual is None else residual.reshape(-1, N)  # a view, where it is to be overwritten
        y = product(rows, weight.mT, stream, overwrite)
        if overwrite:
            ctx.mark_dirty(residual)
            y = residual
        ctx.save_for_backward(rows, weight)
        ctx.main_grad = main_grad
        ctx.x_shape = x.shape
        return y if y is residual else y.view(*x.shape[:-1], N)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        needs_dx, needs_dw, needs_dresidual, *_ = ctx.needs_input_grad
        rows = dy.reshape(-1, weight.shape[0])
        dx = product(rows, weight).view(ctx.x_shape) if needs_dx else None
        dw = weight_grad(rows, x, ctx.main_grad) if needs_dw else None
        return dx, dw, dy if needs_dresidual else None, None, None


def linear(x: Tensor, weight: Tensor, residual: Tensor | None = None, overwrite: bool = False) -> Tensor:
    """A linear layer without bias, its residual added before the one rounding.

    Args:
        x: [..., K], its rows evenly spaced or else copied; weight: [N, K]; residual: [..., N] or None; of one dtype.
            Where `weight` carries `main_grad`, its gradient is added there.
        overwrite: nobody needs `residual` any more: the kernels may write over it, if it is contiguous.

    Returns:
        [..., N].

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    if use_cpu_forms():
        return linear_cpu(x, weight, residual)
    if not use_kernels(x):
        return linear_ref(x, weight, residual)
    overwrite = overwrite and residual is not None and residual.is_contiguous()
    return _Linear.apply(x, weight, residual, getattr(weight, "main_grad", None), overwrite)


def cost(
    rows: int, in_width: int, out_width: int, residual: bool = False, itemsize: int = 2, backward: bool = False
) -> tuple[int, int]:
    """Bytes that have to move and FLOPs, for [rows, in_width] times [out_width, in_width] transposed.

    The weight counts once a product, its fp32 gradient as read and written.
    """
    product = rows * in_width * out_width * 2
    activations, weights = rows * (in_width + out_width) * itemsize, in_width * out_width
    if not backward:
        return activations + rows * out_width * residual * itemsize + weights * itemsize, product
    return 2 * activations + weights * (itemsize + 8), 2 * product
