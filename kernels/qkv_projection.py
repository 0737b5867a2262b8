"""The products before attention: qkv = x·Wᵀ, and the value gate from the first G channels, gate = x[..., :G]·W_gateᵀ.

x: [..., K]; W: [N, K]; W_gate: [KVH, G]. One op, so that the gate's gradient is added to the G channels of dx in place:
by itself it would come back as a tensor of x's size, zero elsewhere, for autograd to add. Backward:

    dx = dqkv·W, and dgate·W_gate on the first G channels;  dW = dqkvᵀ·x;  dW_gate = dgateᵀ·x[..., :G]

With the factors of `norm_factors`, x is the stream itself and the norm is in the epilogue: qkv = rstd ⊙ (x·Wᵀ), and so
the gate. RMSNorm has no weight, so that these are the products of norm(x), which is never written. Its backward is the
same with rstd ⊙ dqkv for dqkv. That comes as it is from `rotary_attention`, which is given qkv and gate as
`GradScaled`: nothing passes over dqkv only to scale it. What reaches x through rstd is c = ⟨dqkv, qkv⟩ a row, and
c = ⟨(rstd ⊙ dqkv)·W, x⟩ too: `norm_factors` takes it from dx, which it has to read anyway. Source: the derivative of
x·rstd.

The vendor's GEMM multiplies for the gate; qkv without rstd and dx are of product.py. Saved: x, W, W_gate. Bytes per
token in 16 bits: 2(K + N) forward; 4(K + N) backward. FLOPs per token: 2KN forward, 4KN backward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .choice import Choice, Tile
from .common import Factors, GradScaled, tl, triton, use_cpu_forms, use_kernels
from .cpu import qkv_projection_cpu
from .gemm import GROUP_M, gemm_candidates, gemm_config, gemm_grid, gemm_tile, tile_offsets
from .product import product
from .weight_grad import weight_grad


def qkv_projection_ref(
    x: Tensor, weight: Tensor, gate_weight: Tensor | None = None, rstd: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    if rstd is not None:
        x = (rstd[..., None] * x).to(x.dtype)
    gate = None if gate_weight is None else F.linear(x[..., : gate_weight.shape[1]], gate_weight)
    return F.linear(x, weight), gate


@triton.jit
def _norm_qkv_fwd_kernel(
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


def _config(N: int, K: int, dtype: torch.dtype) -> Tile:
    return gemm_config(N, K, dtype)


# Of a product [rows, K]·[K, N]: (N, K, dtype).
NORM_FORWARD = Choice("norm-qkv-forward", [_norm_qkv_fwd_kernel], _config, gemm_candidates)


def _norm_qkv_fwd(x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """rstd ⊙ (x·Wᵀ): [M, N]."""
    (M, K), N = x.shape, weight.shape[0]
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    config = NORM_FORWARD(N, K, x.dtype)
    _norm_qkv_fwd_kernel[gemm_grid(M, N, config)](
        x, weight, rstd, y, x.stride(0), x.stride(1), weight.stride(1), weight.stride(0), M, N, K,
        **config, GROUP_M=GROUP_M, EVEN_K=K % config["BLOCK_K"] == 0,
    )  # fmt: skip
    return y


def _check(x: Tensor, weight: Tensor, gate_weight: Tensor | None, rstd: Tensor | None) -> None:
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"x: {x.dtype}, the kernels take float32, float16 and bfloat16")
    for name, matrix in (("weight", weight), ("gate_weight", gate_weight)):
        if matrix is not None and (matrix.dim() != 2 or matrix.dtype != x.dtype):
            raise ValueError(f"{name}: {tuple(matrix.shape)} {matrix.dtype}, expected two dimensions of {x.dtype}")
    if weight.shape[1] != x.shape[-1] or (gate_weight is not None and gate_weight.shape[1] > x.shape[-1]):
        raise ValueError(f"x {tuple(x.shape)} does not fit the weights: the gate's may have fewer columns, never more")
    if rstd is None:
        return
    if rstd.shape != x.shape[:-1] or rstd.dtype != torch.float32 or not rstd.is_contiguous():
        raise ValueError(f"rstd: {tuple(rstd.shape)} {rstd.dtype}, expected {tuple(x.shape[:-1])}, contiguous, float32")


class _QKVProjection(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, gate_weight, rstd, main_grad, main_grad_gate):
        _check(x, weight, gate_weight, rstd)
        ctx.set_materialize_grads(False)
        rows = x.reshape(-1, x.shape[-1])
        qkv = product(rows, weight.mT) if rstd is None else _norm_qkv_fwd(rows, rstd, weight)
        gate = None
        if gate_weight is not None:
            gate = torch.mm(rows[:, : gate_weight.shape[1]], gate_weight.mT)
            if rstd is not None:
                gate.mul_(rstd.view(-1, 1))
            gate = gate.view(*x.shape[:-1], -1)
        ctx.save_for_backward(rows, weight, gate_weight)
        ctx.main_grads, ctx.x_shape = (main_grad, main_grad_gate), x.shape
        return qkv.view(*x.shape[:-1], -1), gate

    @staticmethod
    @once_differentiable
    def backward(ctx, dqkv, dgate):
        x, weight, gate_weight = ctx.saved_tensors
        needs_dx, needs_dw, needs_dw_gate, *_ = ctx.needs_input_grad
        main_grad, main_grad_gate = ctx.main_grads
        dx = torch.zeros_like(x) if needs_dx and dqkv is None else None
        dw = dw_gate = None
        if dqkv is not None:
            dqkv = dqkv.reshape(-1, weight.shape[0])
            if needs_dw:
                dw = weight_grad(dqkv, x, main_grad)
            if needs_dx:
                dx = product(dqkv, weight)
        if dgate is not None:
            dgate = dgate.reshape(-1, gate_weight.shape[0])
            channels = gate_weight.shape[1]
            if needs_dw_gate:
                dw_gate = weight_grad(dgate, x[:, :channels], main_grad_gate)
            if needs_dx:
                dx[:, :channels].addmm_(dgate, gate_weight)
        return None if dx is None else dx.view(ctx.x_shape), dw, dw_gate, None, None, None


def qkv_projection(
    x: Tensor | Factors, weight: Tensor, gate_weight: Tensor | None = None
) -> tuple[Tensor | GradScaled, Tensor | GradScaled | None]:
    """The product with one matrix and, of the first channels, with another.

    Args:
        x: the normed stream, [..., K], or the factors of it from `norm_factors`.
        weight: [N, K]; gate_weight: [KVH, G ≤ K] or None. Where one carries `main_grad`, its gradient is added there.

    Returns:
        qkv [..., N] and gate [..., KVH] or None; of factors as `GradScaled`, for `rotary_attention` alone.

    Raises:
        ValueError: shapes or dtypes that the kernels do not take, or factors without rstd.
    """
    factored = isinstance(x, Factors)
    x, rstd = x if factored else (x, None)
    if factored and rstd is None:
        raise ValueError("x: factors without rstd, which `norm_factors` gives with x0")
    if use_kernels(x):
        main_grads = getattr(weight, "main_grad", None), getattr(gate_weight, "main_grad", None)
        qkv, gate = _QKVProjection.apply(x, weight, gate_weight, rstd, *main_grads)
    elif use_cpu_forms():
        qkv, gate = qkv_projection_cpu(rstd[..., None] * x if factored else x, weight, gate_weight)
    else:
        qkv, gate = qkv_projection_ref(x, weight, gate_weight, rstd)
    if not factored:
        return qkv, gate
    return GradScaled(qkv, rstd), None if gate is None else GradScaled(gate, rstd)


def cost(
    rows: int, in_width: int, out_width: int, gates: int = 0, channels: int = 0,
    norm: bool = False, itemsize: int = 2, backward: bool = False,
) -> tuple[int, int]:  # fmt: skip
    """Bytes that have to move and FLOPs, for x [rows, in_width], W [out_width, in_width] and W_gate [gates, channels],
    as those of `linear`; the gate reads no x of its own. `norm`: with rstd."""
    weights = in_width * out_width + gates * channels
    activations = rows * (in_width + out_width + gates) * itemsize
    if not backward:
        return activations + rows * 4 * norm + weights * itemsize, 2 * rows * weights
    return 2 * activations + weights * (itemsize + 8), 4 * rows * weights
