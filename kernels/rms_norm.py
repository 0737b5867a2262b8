"""RMSNorm without a weight, with what stands before it in the residual stream.

    s = λᵣ·(x + residual) + λ₀·x₀          (each part optional)
    y = s / sqrt(mean(s²) + eps)           eps = 2⁻²³

Both s and y are returned, so that the stream has one consumer and autograd has no sum of its own to make.
x, x₀, residual, s, y: [..., D]; λᵣ, λ₀: scalars. Source: Zhang & Sennrich, arXiv 1910.07467.
"""

import torch
from torch import Tensor

from .common import EPS, upcast


def rms_norm_ref(
    x: Tensor,
    residual: Tensor | None = None,
    x0: Tensor | None = None,
    lambda_r: Tensor | None = None,
    lambda_0: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    s = upcast(x)
    if residual is not None:
        s = s + upcast(residual)
    if x0 is not None:
        s = lambda_r * s + lambda_0 * upcast(x0)
    y = s * torch.rsqrt(s.square().mean(-1, keepdim=True) + EPS)
    return s.to(x.dtype), y.to(x.dtype)


def rms_norm(
    x: Tensor,
    residual: Tensor | None = None,
    x0: Tensor | None = None,
    lambda_r: Tensor | None = None,
    lambda_0: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The mixed stream and its norm.

    Args:
        x, residual, x0: [..., D], one dtype.
        lambda_r, lambda_0: 0-dimensional, fp32 or wider; given exactly when `x0` is.

    Returns:
        (s, y), both shaped and typed like `x`.
    """
    return rms_norm_ref(x, residual, x0, lambda_r, lambda_0)
