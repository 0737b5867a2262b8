"""The products of a normed stream, its rstd in their epilogue: y = rstd ⊙ (x·Wᵀ), gate = rstd ⊙ (x[..., :G]·W_gateᵀ).

x: [..., K], the stream itself; rstd: [...]; W: [N, K]; W_gate: [KVH, G]. RMSNorm has no weight, so that with rstd from
`norm_factors` these are the products of norm(x), which is never written. Backward, with d = rstd ⊙ dy:

    dx = d·W, and dgate·W_gate on the first G channels;  dW = dᵀ·x;  dW_gate = dgateᵀ·x[..., :G]

d comes as it is from `rotary_attention(..., grad_scale=rstd)`: nothing passes over dy only to scale it. What reaches x
through rstd is c = ⟨dy, y⟩ a row, and c = ⟨d·W, x⟩ too: `norm_factors` takes it from dx, which it has to read anyway.

Saved: x, rstd, W, W_gate. Bytes per token in 16 bits: 2(K + N) forward; 4(K + N) backward. FLOPs per token: 2KN
forward, 4KN backward. Source: the derivative of x·rstd; as a model's option not yet measured.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .common import tl, triton, use_kernels, weight_grad
from .gemm import GROUP_M, gemm_config, gemm_grid, gemm_tile, tile_offsets


def norm_linear_ref(
    x: Tensor, rstd: Tensor, weight: Tensor, gate_weight: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    x = (rstd[..., None] * x).to(x.dtype)
    gate = None if gate_weight is None else F.linear(x[..., : gate_weight.shape[1]], gate_weight)
    return F.linear(x, weight), gate


@triton.jit
def _norm_linear_fwd_kernel(
    a_ptr, b_ptr, rstd_ptr, y_ptr, a_stride_m, a_stride_k, b_stride_k, b_stride_n, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """y = rstd ⊙ (a·b)."""
    offs_m, offs_n = tile_offsets(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    acc = gemm_tile(
        a_ptr, b_ptr, a_stride_m, a_stride_k, b_stride_k, b_stride_n, offs_m, offs_n, M, N, K,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K,
    )  # fmt: skip
    rstd = tl.load(rstd_ptr + offs_m, mask=offs_m < M, other=0.0)
    y = (acc * rstd[:, None]).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], y, mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


def _norm_linear_fwd(x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """rstd ⊙ (x·Wᵀ): [M, N]."""
    (M, K), N = x.shape, weight.shape[0]
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    config = gemm_config(N, K, x.dtype)
    _norm_linear_fwd_kernel[gemm_grid(M, N, config)](
        x, weight, rstd, y, x.stride(0), x.stride(1), weight.stride(1), weight.stride(0), M, N, K,
        **config, GROUP_M=GROUP_M, EVEN_K=K % config["BLOCK_K"] == 0,
    )  # fmt: skip
    return y


def _check(x: Tensor, rstd: Tensor, weight: Tensor, gate_weight: Tensor | None) -> None:
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"x: {x.dtype}, the kernels take float32, float16 and bfloat16")
    for name, matrix in (("weight", weight), ("gate_weight", gate_weight)):
        if matrix is not None and (matrix.dim() != 2 or matrix.dtype != x.dtype):
            raise ValueError(f"{name}: {tuple(matrix.shape)} {matrix.dtype}, expected two dimensions of {x.dtype}")
    if weight.shape[1] != x.shape[-1] or (gate_weight is not None and gate_weight.shape[1] > x.shape[-1]):
        raise ValueError(f"x {tuple(x.shape)} does not fit the weights: the gate's may have fewer columns, never more")
    if rstd.shape != x.shape[:-1] or rstd.dtype != torch.float32 or not rstd.is_contiguous():
        raise ValueError(f"rstd: {tuple(rstd.shape)} {rstd.dtype}, expected {tuple(x.shape[:-1])}, contiguous, float32")


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rstd, weight, gate_weight, main_grad, main_grad_gate, grads_scaled):
        _check(x, rstd, weight, gate_weight)
        ctx.set_materialize_grads(False)
        rows = x.reshape(-1, x.shape[-1])
        y = _norm_linear_fwd(rows, rstd, weight)
        gate = None
        if gate_weight is not None:
            product = torch.mm(rows[:, : gate_weight.shape[1]], gate_weight.mT)
            gate = product.mul_(rstd.view(-1, 1)).view(*x.shape[:-1], -1)
        ctx.save_for_backward(rows, rstd, weight, gate_weight)
        ctx.main_grads, ctx.grads_scaled, ctx.x_shape = (main_grad, main_grad_gate), grads_scaled, x.shape
        return y.view(*x.shape[:-1], -1), gate

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dgate):
        x, rstd, weight, gate_weight = ctx.saved_tensors
        needs_dx, _, needs_dw, needs_dw_gate, *_ = ctx.needs_input_grad
        main_grad, main_grad_gate = ctx.main_grads
        if not ctx.grads_scaled:
            dy, dgate = (None if d is None else (rstd[..., None] * d).to(d.dtype) for d in (dy, dgate))
        dx = torch.zeros_like(x) if needs_dx and dy is None else None
        dw = dw_gate = None
        if dy is not None:
            dy = dy.reshape(-1, weight.shape[0])
            if needs_dw:
                dw = weight_grad(dy, x, main_grad)
            if needs_dx:
                dx = torch.mm(dy, weight)
        if dgate is not None:
            dgate = dgate.reshape(-1, gate_weight.shape[0])
            channels = gate_weight.shape[1]
            if needs_dw_gate:
                dw_gate = weight_grad(dgate, x[:, :channels], main_grad_gate)
            if needs_dx:
                dx[:, :channels].addmm_(dgate, gate_weight)
        return None if dx is None else dx.view(ctx.x_shape), None, dw, dw_gate, None, None, None


def norm_linear(
    x: Tensor, rstd: Tensor, weight: Tensor, gate_weight: Tensor | None = None, grads_scaled: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The products of a normed stream with one matrix and, of its first channels, with another.

    Args:
        x: [..., K] and rstd: [...], fp32, both from `norm_factors`: the kernels give rstd no gradient of its own.
        weight: [N, K]; gate_weight: [KVH, G ≤ K] or None. Where one carries `main_grad`, its gradient is added there.
        grads_scaled: the gradients of the results will come multiplied by rstd, row by row, as `rotary_attention`
            gives them with `grad_scale`. References take them as they are, and never come scaled.

    Returns:
        y [..., N] and gate [..., KVH] or None.

    Raises:
        ValueError: shapes or dtypes that the kernels do not take.
    """
    if not use_kernels(x):
        return norm_linear_ref(x, rstd, weight, gate_weight)
    main_grads = getattr(weight, "main_grad", None), getattr(gate_weight, "main_grad", None)
    return _NormLinear.apply(x, rstd, weight, gate_weight, *main_grads, grads_scaled)


def cost(rows: int, in_width: int, out_width: int, itemsize: int = 2, backward: bool = False) -> tuple[int, int]:
    """Bytes that have to move and FLOPs, as those of `linear`; the gate's are a hundredth of them."""
    product = rows * in_width * out_width * 2
    activations, weights = rows * (in_width + out_width) * itemsize, in_width * out_width
    if not backward:
        return activations + rows * 4 + weights * itemsize, product
    return 2 * activations + weights * (itemsize + 8), 2 * product
