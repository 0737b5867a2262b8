"""`adamw_update` and `muon_update` on a CPU: in place, and not at all where nothing is to be applied, which a CPU may
ask at no cost."""

import torch
from torch import Tensor

from ..polar_express import polar_express_ref


def _nothing_applies(apply: Tensor) -> bool:
    return not apply.is_meta and not apply  # where memory is counted there is no answer, and everything runs


@torch.no_grad()
def adamw_update_cpu(masters, grads, exp_avgs, exp_avg_sqs, copies, hyper, apply, betas, eps) -> None:
    """`adamw_update`."""
    if _nothing_applies(apply):
        return
    beta1, beta2 = betas
    lr, bias1, bias2, decay = hyper[:4].unbind()
    for master, grad, m, v, copy in zip(masters, grads, exp_avgs, exp_avg_sqs, copies, strict=True):
        m.lerp_(grad, 1 - beta1)
        if decay.is_meta or decay != 0:
            master.mul_(1 - lr * decay)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        master.sub_(torch.div(m, (v / bias2).sqrt_().add_(eps)).mul_(lr / bias1))
        if copy is not None:
            copy.copy_(master)


@torch.no_grad()
def muon_update_cpu(
    master: Tensor, grad: Tensor, momentum: Tensor, second_moment: Tensor, copy: Tensor | None, hyper: Tensor,
    apply: Tensor, iterate_dtype: torch.dtype, beta2: float,
) -> None:  # fmt: skip
    """`muon_update`."""
    if _nothing_applies(apply):
        return
    lr, mu, weight_decay = hyper[:3].unbind()
    momentum.lerp_(grad, 1 - mu)
    g = polar_express_ref(grad.lerp(momentum, mu), iterate_dtype).to(master.dtype)

    along, matrix = -1 if master.shape[-2] >= master.shape[-1] else -2, (-2, -1)
    squares = g.square().mean(along, keepdim=True)
    second_moment.lerp_(squares, 1 - beta2)
    scale = second_moment.clamp_min(1e-10).rsqrt_()
    # ‖g‖ and ‖g·s‖ up to the same factor: each line's squares are its mean, times what all lines have in common.
    before, after = (each.sum(matrix, keepdim=True) for each in (squares, squares * scale.square()))
    ratio = (before / after.clamp_min(1e-20)).sqrt_()
    g *= scale * (lr * ratio)
    decay = (g * master >= 0).to(master.dtype).mul_(lr * weight_decay)
    master.sub_(decay.mul_(master).add_(g))
    if copy is not None:
        copy.copy_(master)
