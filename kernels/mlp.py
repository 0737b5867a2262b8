"""The feed-forward block: out = residual + relu(x·W_fcᵀ)²·W_projᵀ.

x, residual, out: [..., D]; W_fc: [F, D]; W_proj: [D, F]. Backward, with post = relu(x·W_fcᵀ)²:

    dz = 2·√post·(dout·W_proj);  dx = dz·W_fc;  dW_fc = dzᵀ·x;  dW_proj = doutᵀ·post;  dresidual = dout

√post is relu(z), so z itself is neither kept nor written: relu² and its backward live in the epilogues of the products
around them, and the residual in that of the second one. The plain products are the vendor's.

Saved: x, post, W_fc, W_proj. Bytes per token in 16 bits: 4F + 6D forward; 10F + 8D backward. FLOPs per token: 4DF
forward, 8DF backward. Source of relu²: So et al., Primer, arXiv 2109.08668.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .common import tl, triton, use_kernels, weight_grad
from .gemm import GROUP_M, gemm_config, gemm_grid, gemm_tile, tile_offsets


def relu2_mlp_ref(x: Tensor, w_fc: Tensor, w_proj: Tensor, residual: Tensor) -> Tensor:
    post = F.relu(F.linear(x, w_fc)).square()
    return residual + F.linear(post, w_proj)


@triton.jit
def _fc_fwd_kernel(
    a_ptr, b_ptr, post_ptr, a_stride_m, a_stride_k, b_stride_k, b_stride_n, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """post = relu(a·b)²."""
    offs_m, offs_n = tile_offsets(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    z = gemm_tile(
        a_ptr, b_ptr, a_stride_m, a_stride_k, b_stride_k, b_stride_n, offs_m, offs_n, M, N, K,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K,
    )  # fmt: skip
    z = tl.maximum(z, 0.0)
    post = (z * z).to(post_ptr.dtype.element_ty)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    tl.store(post_ptr + offs_m[:, None] * N + offs_n[None, :], post, mask=mask)


@triton.jit
def _proj_fwd_kernel(
    a_ptr, b_ptr, residual_ptr, out_ptr, a_stride_m, a_stride_k, b_stride_k, b_stride_n, residual_stride_m, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """out = residual + a·b."""
    offs_m, offs_n = tile_offsets(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    acc = gemm_tile(
        a_ptr, b_ptr, a_stride_m, a_stride_k, b_stride_k, b_stride_n, offs_m, offs_n, M, N, K,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K,
    )  # fmt: skip
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    residual = tl.load(residual_ptr + offs_m[:, None] * residual_stride_m + offs_n[None, :], mask=mask, other=0.0)
    out = (acc + residual.to(tl.float32)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs_m[:, None] * N + offs_n[None, :], out, mask=mask)


@triton.jit
def _proj_bwd_kernel(
    a_ptr, b_ptr, post_ptr, dz_ptr, a_stride_m, a_stride_k, b_stride_k, b_stride_n, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """dz = 2·√post·(a·b)."""
    offs_m, offs_n = tile_offsets(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    dpost = gemm_tile(
        a_ptr, b_ptr, a_stride_m, a_stride_k, b_stride_k, b_stride_n, offs_m, offs_n, M, N, K,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K,
    )  # fmt: skip
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    offs = offs_m[:, None] * N + offs_n[None, :]
    post = tl.load(post_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    dz = (2.0 * tl.sqrt(post) * dpost).to(dz_ptr.dtype.element_ty)
    tl.store(dz_ptr + offs, dz, mask=mask)


def _config(N: int, K: int, dtype: torch.dtype) -> dict[str, int]:
    config = gemm_config(N, K, dtype)
    return {**config, "GROUP_M": GROUP_M, "EVEN_K": K % config["BLOCK_K"] == 0}


def _fc_fwd(x: Tensor, w_fc: Tensor) -> Tensor:
    """relu(x·W_fcᵀ)²: [M, F]."""
    (M, K), N = x.shape, w_fc.shape[0]
    post = torch.empty(M, N, dtype=x.dtype, device=x.device)
    config = _config(N, K, x.dtype)
    _fc_fwd_kernel[gemm_grid(M, N, config)](
        x, w_fc, post, x.stride(0), x.stride(1), w_fc.stride(1), w_fc.stride(0), M, N, K, **config
    )
    return post


def _proj_fwd(post: Tensor, w_proj: Tensor, residual: Tensor) -> Tensor:
    """residual + post·W_projᵀ: [M, D]."""
    (M, K), N = post.shape, w_proj.shape[0]
    out = torch.empty(M, N, dtype=post.dtype, device=post.device)
    config = _config(N, K, post.dtype)
    _proj_fwd_kernel[gemm_grid(M, N, config)](
        post, w_proj, residual, out, post.stride(0), post.stride(1), w_proj.stride(1), w_proj.stride(0),
        residual.stride(0), M, N, K, **config,
    )  # fmt: skip
    return out


def _proj_bwd(dout: Tensor, w_proj: Tensor, post: Tensor) -> Tensor:
    """2·√post·(dout·W_proj): [M, F]."""
    (M, K), N = dout.shape, w_proj.shape[1]
    dz = torch.empty(M, N, dtype=post.dtype, device=post.device)
    config = _config(N, K, post.dtype)
    _proj_bwd_kernel[gemm_grid(M, N, config)](
        dout, w_proj, post, dz, dout.stride(0), dout.stride(1), w_proj.stride(0), w_proj.stride(1), M, N, K, **config
    )
    return dz


def _check(x: Tensor, w_fc: Tensor, w_proj: Tensor, residual: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"x: {x.dtype}, the kernels take float32, float16 and bfloat16")
    for name, tensor in (("w_fc", w_fc), ("w_proj", w_proj), ("residual", residual)):
        if tensor.dtype != x.dtype:
            raise ValueError(f"{name}: {tensor.dtype}, x has {x.dtype}")
    if w_fc.dim() != 2 or w_fc.shape[1] != x.shape[-1] or w_proj.shape != (w_fc.shape[1], w_fc.shape[0]):
        raise ValueError(f"w_fc {tuple(w_fc.shape)} and w_proj {tuple(w_proj.shape)}: expected [F, D] and [D, F]")
    if residual.shape != x.shape:
        raise ValueError(f"residual: {tuple(residual.shape)}, x has {tuple(x.shape)}")
    if residual.stride(-1) != 1 and residual.shape[-1] != 1:
        raise ValueError(f"residual: stride {residual.stride(-1)} along the last dimension, the kernels need 1")


class _Relu2MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w_fc, w_proj, residual, main_grad_fc, main_grad_proj):
        _check(x, w_fc, w_proj, residual)
        rows = x.reshape(-1, x.shape[-1])
        post = _fc_fwd(rows, w_fc)
        out = _proj_fwd(post, w_proj, residual.reshape(rows.shape))
        ctx.save_for_backward(rows, post, w_fc, w_proj)
        ctx.main_grads = main_grad_fc, main_grad_proj
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, post, w_fc, w_proj = ctx.saved_tensors
        needs_dx, needs_dw_fc, needs_dw_proj, needs_dresidual, *_ = ctx.needs_input_grad
        main_grad_fc, main_grad_proj = ctx.main_grads
        rows = dout.reshape(x.shape)
        dx = dw_fc = dw_proj = None
        if needs_dw_proj:
            dw_proj = weight_grad(rows, post, main_grad_proj)
        if needs_dx or needs_dw_fc:
            dz = _proj_bwd(rows, w_proj, post)
            if needs_dw_fc:
                dw_fc = weight_grad(dz, x, main_grad_fc)
            if needs_dx:
                dx = torch.mm(dz, w_fc).view(dout.shape)
        return dx, dw_fc, dw_proj, dout if needs_dresidual else None, None, None


def relu2_mlp(x: Tensor, w_fc: Tensor, w_proj: Tensor, residual: Tensor) -> Tensor:
    """The feed-forward block with its residual.

    Args:
        x: [..., D], the normed stream.
        w_fc: [F, D]; w_proj: [D, F]. Where one carries `main_grad`, its gradient is added there.
        residual: [..., D], the stream itself.

    Returns:
        [..., D].

    Raises:
        ValueError: shapes, dtypes or strides that the kernels do not take.
    """
    if not use_kernels(x):
        return relu2_mlp_ref(x, w_fc, w_proj, residual)
    main_grads = getattr(w_fc, "main_grad", None), getattr(w_proj, "main_grad", None)
    return _Relu2MLP.apply(x, w_fc, w_proj, residual, *main_grads)


def cost(rows: int, width: int, hidden: int, itemsize: int = 2, backward: bool = False) -> tuple[int, int]:
    """Bytes that have to move and FLOPs of all the block's products, for [rows, width] and [hidden, width].

    A weight counts once a product, its fp32 gradient as read and written.
    """
    product, weight = 2 * rows * width * hidden, width * hidden
    if not backward:  # x, post written and read, residual, out
        return (rows * (3 * width + 2 * hidden) + 2 * weight) * itemsize, 2 * product
    # dout and post for dz, which is written; dz for dx, which is written; dz and x for dW_fc; dout and post for dW_proj
    activations = rows * (4 * width + 5 * hidden) * itemsize
    return activations + weight * (2 * itemsize + 2 * 8), 4 * product
