"""Muon with NorMuon's variance reduction and cautious decay, for a batch of matrices of one shape.

    M ← μM + (1−μ)G;  g = (1−μ)G + μM;  g ← polar_express(g)
    v = mean of g² along each row (rows ≥ cols) or each column;  V ← β₂V + (1−β₂)v;  s = max(V, 1e-10)^−½
    g ← g·s·(‖g‖_F / ‖g·s‖_F)
    W ← W − lr·g − lr·wd·W·[g·W ≥ 0]

Sources: Muon, Jordan et al. 2024 (kellerjordan.github.io/posts/muon); NorMuon, Li et al., arXiv 2510.05491; cautious
decay, Chen et al., arXiv 2510.12402.
"""

import torch
from torch import Tensor

from .polar_express import polar_express_ref

BETA2 = 0.95
# Columns of a row of hyperparameters (fp32, on the device: a captured step reads them anew at every replay).
LR, MOMENTUM, WEIGHT_DECAY = 0, 1, 2


def second_moment_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of V for matrices [..., rows, cols]: one number a row where rows ≥ cols, else one a column."""
    *batch, rows, cols = shape
    return (*batch, rows, 1) if rows >= cols else (*batch, 1, cols)


@torch.no_grad()
def muon_update_ref(
    master: Tensor,
    grad: Tensor,
    momentum: Tensor,
    second_moment: Tensor,
    copy: Tensor | None,
    hyper: Tensor,
    apply: Tensor,
    iterate_dtype: torch.dtype = torch.bfloat16,
) -> None:
    lr, mu, weight_decay = hyper[LR], hyper[MOMENTUM], hyper[WEIGHT_DECAY]
    new_momentum = momentum.lerp(grad, 1 - mu)
    g = polar_express_ref(grad.lerp(new_momentum, mu), iterate_dtype).to(master.dtype)

    along = -1 if master.shape[-2] >= master.shape[-1] else -2
    v = g.square().mean(along, keepdim=True)
    new_second_moment = second_moment.lerp(v, 1 - BETA2)
    scaled = g * new_second_moment.clamp_min(1e-10).rsqrt()
    matrix = (-2, -1)
    g = scaled * (g.norm(dim=matrix, keepdim=True) / scaled.norm(dim=matrix, keepdim=True).clamp_min(1e-10))

    new_master = master - lr * g - lr * weight_decay * master * (g * master >= 0)
    for old, new in ((momentum, new_momentum), (second_moment, new_second_moment), (master, new_master)):
        old.copy_(torch.where(apply, new, old))
    if copy is not None:
        copy.copy_(master)


def muon_update(
    master: Tensor,
    grad: Tensor,
    momentum: Tensor,
    second_moment: Tensor,
    copy: Tensor | None,
    hyper: Tensor,
    apply: Tensor,
) -> None:
    """One step, in place, for `batch` matrices.

    Args:
        master, grad, momentum: [batch, rows, cols], fp32; views with any batch and row stride.
        second_moment: `second_moment_shape(master.shape)`, fp32.
        copy: the bf16 tensor that the forward reads, shaped like `master`, or None where it reads the master.
        hyper: [≥ 3] fp32 on the device: learning rate, momentum, weight decay.
        apply: scalar boolean on the device; where it is false nothing changes.
    """
    muon_update_ref(master, grad, momentum, second_moment, copy, hyper, apply)
