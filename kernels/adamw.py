"""AdamW without decay, for all tensors of a group.

    m ← β₁m + (1−β₁)g;  v ← β₂v + (1−β₂)g²;  w ← w − lr·(m / (1−β₁ᵗ)) / (sqrt(v / (1−β₂ᵗ)) + eps)

Source: Kingma & Ba, arXiv 1412.6980; Loshchilov & Hutter, arXiv 1711.05101. No group here decays its weights.
"""

import torch
from torch import Tensor

# Columns of a row of hyperparameters (fp32, on the device: a captured step reads them anew at every replay).
LR, BIAS1, BIAS2 = 0, 1, 2


@torch.no_grad()
def adamw_update_ref(
    masters: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    copies: list[Tensor | None],
    hyper: Tensor,
    apply: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    beta1, beta2 = betas
    for master, grad, m, v, copy in zip(masters, grads, exp_avgs, exp_avg_sqs, copies, strict=True):
        new_m = m.lerp(grad, 1 - beta1)
        new_v = v.lerp(grad.square(), 1 - beta2)
        update = (new_m / hyper[BIAS1]) / ((new_v / hyper[BIAS2]).sqrt() + eps)
        new_master = master - hyper[LR] * update
        for old, new in ((m, new_m), (v, new_v), (master, new_master)):
            old.copy_(torch.where(apply, new, old))
        if copy is not None:
            copy.copy_(master)


def adamw_update(
    masters: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    copies: list[Tensor | None],
    hyper: Tensor,
    apply: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One step, in place, for every tensor of a group.

    Args:
        masters, grads, exp_avgs, exp_avg_sqs: lists of fp32 tensors, alike in shape position by position.
        copies: the bf16 tensors that the forward reads, or None where it reads the master.
        hyper: [≥ 3] fp32 on the device: learning rate, 1 − β₁ᵗ, 1 − β₂ᵗ.
        apply: scalar boolean on the device; where it is false nothing changes.
        betas, eps: constants of the group.
    """
    adamw_update_ref(masters, grads, exp_avgs, exp_avg_sqs, copies, hyper, apply, betas, eps)
