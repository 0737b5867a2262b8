"""`linear`, `qkv_projection` and `relu2_mlp` on a CPU: the operands of a product are converted once, and kept so."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def add_weight_grad(main_grad: Tensor | None, dw: Tensor, alpha: float = 1.0) -> Tensor | None:
    """alpha·dw, added to `main_grad`; where there is none, what autograd is to have."""
    if main_grad is None:
        return dw.mul_(alpha) if alpha != 1 else dw
    main_grad.add_(dw, alpha=alpha)
    return None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, residual, main_grad):
        rows = x.reshape(-1, x.shape[-1]).to(weight.dtype)
        ctx.save_for_backward(rows, weight)
        ctx.main_grad, ctx.x_shape = main_grad, x.shape
        y = torch.mm(rows, weight.mT).view(*x.shape[:-1], -1)
        return y if residual is None else residual + y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        rows, weight = ctx.saved_tensors
        needs_dx, needs_dw, needs_dresidual, _ = ctx.needs_input_grad
        d = dy.reshape(-1, dy.shape[-1]).to(weight.dtype)
        dx = torch.mm(d, weight).view(ctx.x_shape) if needs_dx else None
        dw = add_weight_grad(ctx.main_grad, torch.mm(d.mT, rows)) if needs_dw else None
        return dx, dw, dy if needs_dresidual else None, None


def linear_cpu(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    """`linear`; x and residual may be wider than the weight."""
    return _Linear.apply(x, weight, residual, getattr(weight, "main_grad", None))


class _QKVProjection(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, gate_weight, main_grad, main_grad_gate):
        ctx.set_materialize_grads(False)
        rows = x.reshape(-1, x.shape[-1]).to(weight.dtype)
        ctx.save_for_backward(rows, weight, gate_weight)
        ctx.main_grads, ctx.x_shape = (main_grad, main_grad_gate), x.shape
        qkv = torch.mm(rows, weight.mT).view(*x.shape[:-1], -1)
        if gate_weight is None:
            return qkv, None
        return qkv, torch.mm(rows[:, : gate_weight.shape[1]], gate_weight.mT).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dqkv, dgate):
        rows, weight, gate_weight = ctx.saved_tensors
        main_grad, main_grad_gate = ctx.main_grads
        dw = dw_gate = None
        if dqkv is None:
            dx = torch.zeros_like(rows)
        else:
            dqkv = dqkv.reshape(-1, weight.shape[0])
            dx = torch.mm(dqkv, weight)
            dw = add_weight_grad(main_grad, torch.mm(dqkv.mT, rows))
        if dgate is not None:
            dgate, channels = dgate.reshape(-1, gate_weight.shape[0]), gate_weight.shape[1]
            dx[:, :channels].addmm_(dgate, gate_weight)
            dw_gate = add_weight_grad(main_grad_gate, torch.mm(dgate.mT, rows[:, :channels]))
        return dx.view(ctx.x_shape), dw, dw_gate, None, None


def qkv_projection_cpu(x: Tensor, weight: Tensor, gate_weight: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """`qkv_projection`; x may be wider than the weights, whose dtype both results have."""
    main_grads = getattr(weight, "main_grad", None), getattr(gate_weight, "main_grad", None)
    return _QKVProjection.apply(x, weight, gate_weight, *main_grads)


class _Relu2MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w_fc, w_proj, residual, main_grad_fc, main_grad_proj):
        rows = x.reshape(-1, x.shape[-1]).to(w_fc.dtype)
        root = torch.mm(rows, w_fc.mT).relu_()
        post = root * root
        ctx.save_for_backward(rows, root, post, w_fc, w_proj)
        ctx.main_grads, ctx.x_shape = (main_grad_fc, main_grad_proj), x.shape
        return residual + torch.mm(post, w_proj.mT).view(residual.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        rows, root, post, w_fc, w_proj = ctx.saved_tensors
        main_grad_fc, main_grad_proj = ctx.main_grads
        d = dout.reshape(-1, dout.shape[-1]).to(w_proj.dtype)
        dw_proj = add_weight_grad(main_grad_proj, torch.mm(d.mT, post))
        # dz = 2·root·dpost; the 2, exact in every dtype, waits for the ends.
        dz = torch.mm(d, w_proj).mul_(root)
        dx = torch.mm(dz, w_fc).mul_(2)
        dw_fc = add_weight_grad(main_grad_fc, torch.mm(dz.mT, rows), alpha=2)
        return dx.view(ctx.x_shape), dw_fc, dw_proj, dout, None, None


def relu2_mlp_cpu(x: Tensor, w_fc: Tensor, w_proj: Tensor, residual: Tensor) -> Tensor:
    """`relu2_mlp`; x and residual may be wider than the weights."""
    main_grads = getattr(w_fc, "main_grad", None), getattr(w_proj, "main_grad", None)
    return _Relu2MLP.apply(x, w_fc, w_proj, residual, *main_grads)
