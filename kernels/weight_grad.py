"""dW = dyᵀ·x, the gradient of the weight of y = x·Wᵀ, summed in fp32: every op with a weight makes its own by it."""

from functools import cache

import torch
from torch import Tensor

__all__ = ["weight_grad"]


@cache
def _has_accumulating_gemm(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `addmm` takes 16-bit factors and adds their product to an fp32 matrix in place: tried once a device.

    Seen in the sources of PyTorch 2.11 and later; earlier ones raise, since they want all three of one dtype.
    """
    out = torch.full((16, 16), 0.5, device=device)
    factor = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        torch.addmm(out, factor.mT, factor, out_dtype=torch.float32, out=out)
    except (RuntimeError, TypeError):
        return False
    return bool((out == 16.5).all())


def weight_grad(dy: Tensor, x: Tensor, main_grad: Tensor | None) -> Tensor | None:
    """dW = dyᵀ·x of y = x·Wᵀ, summed in fp32.

    Args:
        dy: [M, N]; x: [M, K], of one dtype.
        main_grad: [N, K] fp32, to which dW is added in place, or None.

    Returns:
        None where `main_grad` took the gradient, else dW in the dtype of x.
    """
    if main_grad is None:
        return torch.mm(dy.mT, x)
    if x.dtype == main_grad.dtype:
        main_grad.addmm_(dy.mT, x)
    elif x.is_meta:
        pass  # as the next: in place, with nothing allocated; not every PyTorch knows that product without memory
    elif x.is_cuda and _has_accumulating_gemm(x.device, x.dtype):
        # C and D of the GEMM are main_grad: it is read and written once, and the product never exists by itself.
        torch.addmm(main_grad, dy.mT, x, out_dtype=main_grad.dtype, out=main_grad)
    elif x.is_cuda:
        main_grad.add_(torch.mm(dy.mT, x, out_dtype=main_grad.dtype))
    else:
        main_grad.addmm_(dy.mT.to(main_grad.dtype), x.to(main_grad.dtype))
    return None
