"""The feed-forward block: out = residual + relu(x·W_fcᵀ)²·W_projᵀ.

x, residual, out: [..., D]; W_fc: [F, D]; W_proj: [D, F]. Backward, with post = relu(x·W_fcᵀ)²:

    dz = 2·√post·(dout·W_proj);  dx = dz·W_fc;  dW_fc = dzᵀ·x;  dW_proj = doutᵀ·post;  dresidual = dout

√post is relu(z), so z itself is neither kept nor written: relu² and its backward live in the epilogues of the products
around them. dz takes the memory of post once dW_proj has been taken from it, unless the graph is kept for another
backward. The product that adds to the residual fuses nothing else, and dx nothing at all: both are product.py's.

`norm_relu2_mlp` has the norm inside: out = x + relu(norm(x)·W_fcᵀ)²·W_projᵀ. With rstd = 1/√(mean(x²) + eps) a row, the
norm is a factor in the first product's epilogue, and neither it nor its gradient is ever written. Backward, with
dz = rstd ⊙ 2·√post·dpost, which serves dW_fc = dzᵀ·x too:

    c = ⟨dz/rstd, z⟩ = 2·Σ dpost·post;  dx = dout + dz·W_fc − x·rstd²·c/D

c is summed in the epilogue that has dpost and post, a tile's columns at a time; its [F / tile, rows] partial sums are
added up, always in the same order, in the epilogue of dz·W_fc, which writes dx. Source: the derivative of x·rstd.

Saved: x, post, W_fc, W_proj; with `recompute` no post: the first product runs again in the backward, which spares 2F
bytes a token to keep and costs 2DF FLOPs and 2D + 2F bytes a token to do. Bytes per token in 16 bits: 4F + 6D forward,
4D more where PyTorch has to copy the residual; 10F + 8D backward. FLOPs per token: 4DF forward, 8DF backward. Source of
relu²: So et al., Primer, arXiv 2109.08668.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .choice import Choice, Tile, fitting_block
from .common import EPS, Factors, graph_is_kept, tl, triton, upcast, use_cpu_forms, use_kernels
from .cpu import relu2_mlp_cpu, rms_norm_cpu
from .gemm import (
    column_halves,
    fitting_tile,
    gemm_candidates,
    gemm_config,
    gemm_grid,
    gemm_tile,
    gemm_tile_tma,
    half_blocks,
    launch_options,
    persistent_candidates,
    persistent_launch,
    tile_at,
    tile_index,
    tile_offsets,
)
from .product import product
from .weight_grad import weight_grad


def relu2_mlp_ref(x: Tensor, w_fc: Tensor, w_proj: Tensor, residual: Tensor) -> Tensor:
    post = F.relu(F.linear(x, w_fc)).square()
    return residual + F.linear(post, w_proj)


def norm_relu2_mlp_ref(x: Tensor, w_fc: Tensor, w_proj: Tensor) -> Tensor:
    s = upcast(x)
    y = s * torch.rsqrt(s.square().mean(-1, keepdim=True) + EPS)
    return relu2_mlp_ref(y.to(x.dtype), w_fc, w_proj, x)


@triton.jit
def _rstd_kernel(x_ptr, rstd_ptr, x_stride_m, M, D, EPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """rstd = 1 / sqrt(mean(x²) + eps), row by row."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    squares = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask = (offs_m < M)[:, None] & (offs_d < D)[None, :]
        x = tl.load(x_ptr + offs_m[:, None] * x_stride_m + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
        squares += x * x
    tl.store(rstd_ptr + offs_m, 1.0 / tl.sqrt_rn(tl.sum(squares, axis=1) / D + EPS), mask=offs_m < M)


@triton.jit
def _relu2(z):
    z = tl.maximum(z, 0.0)
    return z * z


@triton.jit
def _relu2_grad(post, dpost):
    """dz, and √post."""
    post = post.to(tl.float32)
    root = tl.sqrt(post)
    return 2.0 * root * dpost, root


@triton.jit
def _fc_fwd_kernel(
    a_ptr, b_ptr, rstd_ptr, post_ptr, a_stride_m, a_stride_k, b_stride_k, b_stride_n, M, N, K, HAS_NORM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """post = relu(a·b)², with HAS_NORM relu(rstd ⊙ (a·b))²."""
    offs_m, offs_n = tile_offsets(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    z = gemm_tile(
        a_ptr, b_ptr, a_stride_m, a_stride_k, b_stride_k, b_stride_n, offs_m, offs_n, M, N, K,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K,
    )  # fmt: skip
    if HAS_NORM:
        z *= tl.load(rstd_ptr + offs_m, mask=offs_m < M, other=0.0)[:, None]
    post = _relu2(z).to(post_ptr.dtype.element_ty)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    tl.store(post_ptr + offs_m[:, None] * N + offs_n[None, :], post, mask=mask)


@triton.jit
def _proj_bwd_kernel(
    a_ptr, b_ptr, rstd_ptr, post_ptr, c_ptr, a_stride_m, a_stride_k, b_stride_k, b_stride_n, M, N, K,
    HAS_NORM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """dz = 2·√post·(a·b), in place of post. With HAS_NORM rstd ⊙ dz, and this tile's part of c."""
    offs_m, offs_n = tile_offsets(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    dpost = gemm_tile(
        a_ptr, b_ptr, a_stride_m, a_stride_k, b_stride_k, b_stride_n, offs_m, offs_n, M, N, K,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K,
    )  # fmt: skip
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    offs = offs_m[:, None] * N + offs_n[None, :]
    dz, root = _relu2_grad(tl.load(post_ptr + offs, mask=mask, other=0.0), dpost)
    if HAS_NORM:
        c = tl.sum(dz * root, axis=1)
        _, tile_n = tile_index(M, N, BLOCK_M, BLOCK_N, GROUP_M)
        tl.store(c_ptr + tile_n.to(tl.int64) * M + offs_m, c, mask=offs_m < M)
        dz *= tl.load(rstd_ptr + offs_m, mask=offs_m < M, other=0.0)[:, None]
    tl.store(post_ptr + offs, dz.to(post_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _fc_fwd_tma_kernel(
    a_desc, b_desc, rstd_ptr, post_desc, M, N, K, HAS_NORM: tl.constexpr, B_BY_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """What `_fc_fwd_kernel` computes, persistent."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        tile_m, tile_n = tile_at(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        first_m, first_n = tile_m * BLOCK_M, tile_n * BLOCK_N
        z = gemm_tile_tma(a_desc, b_desc, first_m, first_n, K, B_BY_K, BLOCK_M, BLOCK_N, BLOCK_K)
        if HAS_NORM:
            offs_m = first_m + tl.arange(0, BLOCK_M)
            z *= tl.load(rstd_ptr + offs_m, mask=offs_m < M, other=0.0)[:, None]
        left, right = column_halves(_relu2(z), BLOCK_M, BLOCK_N)
        post_desc.store([first_m, first_n], left.to(post_desc.dtype))
        post_desc.store([first_m, first_n + BLOCK_N // 2], right.to(post_desc.dtype))


@triton.jit
def _proj_bwd_half(dpost, post_desc, first_m, first_n, rstd, HAS_NORM: tl.constexpr):
    """dz in place of one half of a tile's post; with HAS_NORM rstd ⊙ dz, and this half's part of c.

    Both ways by TMA, whose copies run beside the program, and still in order: the load has come back, its barrier has
    been waited for, before there is a dz to store. No other load of these elements is in the whole launch: each belongs
    to one half of one tile, and each tile to one program. What loads early here are the factors of the next tile.
    """
    dz, root = _relu2_grad(post_desc.load([first_m, first_n]), dpost)
    c = 0.0
    if HAS_NORM:
        c = tl.sum(dz * root, axis=1)
        dz *= rstd[:, None]
    post_desc.store([first_m, first_n], dz.to(post_desc.dtype))
    return c


@triton.jit
def _proj_bwd_tma_kernel(
    a_desc, b_desc, rstd_ptr, post_desc, c_ptr, M, N, K, HAS_NORM: tl.constexpr, B_BY_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """What `_proj_bwd_kernel` computes, persistent."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        tile_m, tile_n = tile_at(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        first_m, first_n = tile_m * BLOCK_M, tile_n * BLOCK_N
        dpost = gemm_tile_tma(a_desc, b_desc, first_m, first_n, K, B_BY_K, BLOCK_M, BLOCK_N, BLOCK_K)
        left, right = column_halves(dpost, BLOCK_M, BLOCK_N)
        offs_m = first_m + tl.arange(0, BLOCK_M)
        rstd = 1.0
        if HAS_NORM:
            rstd = tl.load(rstd_ptr + offs_m, mask=offs_m < M, other=0.0)
        c = _proj_bwd_half(left, post_desc, first_m, first_n, rstd, HAS_NORM)
        c += _proj_bwd_half(right, post_desc, first_m, first_n + BLOCK_N // 2, rstd, HAS_NORM)
        if HAS_NORM:
            tl.store(c_ptr + tile_n.to(tl.int64) * M + offs_m, c, mask=offs_m < M)


@triton.jit
def _norm_fc_bwd_kernel(
    a_ptr, b_ptr, x_ptr, dout_ptr, rstd_ptr, c_ptr, dx_ptr, a_stride_m, a_stride_k, b_stride_k, b_stride_n, x_stride_m,
    dout_stride_m, M, N, K, C_TILES,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """dx = dout + a·b − x·rstd²·c/N, with c the sum of its C_TILES parts."""
    offs_m, offs_n = tile_offsets(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    acc = gemm_tile(
        a_ptr, b_ptr, a_stride_m, a_stride_k, b_stride_k, b_stride_n, offs_m, offs_n, M, N, K,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K,
    )  # fmt: skip
    c = tl.zeros([BLOCK_M], dtype=tl.float32)
    c_ptrs = c_ptr + offs_m
    for _ in range(C_TILES):
        c += tl.load(c_ptrs, mask=offs_m < M, other=0.0)
        c_ptrs += M
    rstd = tl.load(rstd_ptr + offs_m, mask=offs_m < M, other=0.0)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    dout = tl.load(dout_ptr + offs_m[:, None] * dout_stride_m + offs_n[None, :], mask=mask, other=0.0)
    acc += dout.to(tl.float32)
    x = tl.load(x_ptr + offs_m[:, None] * x_stride_m + offs_n[None, :], mask=mask, other=0.0)
    acc -= x.to(tl.float32) * (rstd * rstd * c / N)[:, None]
    tl.store(dx_ptr + offs_m[:, None] * N + offs_n[None, :], acc.to(dx_ptr.dtype.element_ty), mask=mask)


def _config(N: int, K: int, dtype: torch.dtype) -> Tile:
    return gemm_config(N, K, dtype)


def _tight_config(N: int, K: int, dtype: torch.dtype) -> Tile:
    """For an epilogue that holds more than the sums: there the large tile of a long K would spill."""
    return gemm_config(N, min(K, 1024) if K % 16 == 0 else K, dtype)


def _candidates(N: int, K: int, dtype: torch.dtype) -> list[Tile]:
    return gemm_candidates(N, K, dtype) + persistent_candidates(N, K, dtype)


def _tight_candidates(N: int, K: int, dtype: torch.dtype) -> list[Tile]:
    return gemm_candidates(N, K, dtype, tight=True)


def _norm_proj_candidates(N: int, K: int, dtype: torch.dtype) -> list[Tile]:
    return _tight_candidates(N, K, dtype) + persistent_candidates(N, K, dtype)


# Of a product [rows, K]·[K, N]: (N, K, dtype). Those of the block with its norm inside have names of their own.
FC_FORWARD = {
    normed: Choice(name, [_fc_fwd_kernel, _fc_fwd_tma_kernel], _config, _candidates)
    for normed, name in ((False, "mlp-fc-forward"), (True, "norm-mlp-fc-forward"))
}
_PROJ_KERNELS = _proj_bwd_kernel, _proj_bwd_tma_kernel
PROJ_BACKWARD = {
    False: Choice("mlp-proj-backward", _PROJ_KERNELS, _config, _candidates),
    True: Choice("norm-mlp-proj-backward", _PROJ_KERNELS, _tight_config, _norm_proj_candidates),
}
FC_BACKWARD = Choice("norm-mlp-fc-backward", [_norm_fc_bwd_kernel], _tight_config, _tight_candidates)


def _rstd(x: Tensor) -> Tensor:
    """1 / sqrt(mean(x²) + eps) of the rows: [M] in fp32."""
    M, D = x.shape
    rstd = torch.empty(M, dtype=torch.float32, device=x.device)
    block_d = fitting_block(D, 1024)
    block_m = max(1, 2048 // block_d)
    _rstd_kernel[(triton.cdiv(M, block_m),)](
        x, rstd, x.stride(0), M, D, EPS=EPS, BLOCK_M=block_m, BLOCK_D=block_d, num_warps=4
    )
    return rstd


def _fc_fwd(x: Tensor, w_fc: Tensor, rstd: Tensor | None = None) -> Tensor:
    """relu(x·W_fcᵀ)² or relu(rstd ⊙ x·W_fcᵀ)²: [M, F]."""
    (M, K), N = x.shape, w_fc.shape[0]
    post = torch.empty(M, N, dtype=x.dtype, device=x.device)
    normed = rstd is not None
    tile = fitting_tile(FC_FORWARD[normed], (N, K, x.dtype), x, w_fc.mT)
    if tile.get("persistent"):
        grid, factors, options = persistent_launch(x, w_fc.mT, tile)
        _fc_fwd_tma_kernel[grid](*factors, rstd, half_blocks(post, tile), M, N, K, HAS_NORM=normed, **options)
        return post
    _fc_fwd_kernel[gemm_grid(M, N, tile)](
        x, w_fc, rstd, post, x.stride(0), x.stride(1), w_fc.stride(1), w_fc.stride(0), M, N, K,
        HAS_NORM=normed, **launch_options(tile, K),
    )  # fmt: skip
    return post


def _proj_bwd_(
    dout: Tensor, w_proj: Tensor, post: Tensor, rstd: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """2·√post·(dout·W_proj), with rstd times it, in place of post: [M, F]; and with rstd the parts of c: [tiles, M]."""
    (M, K), N = dout.shape, w_proj.shape[1]
    normed = rstd is not None
    tile = fitting_tile(PROJ_BACKWARD[normed], (N, K, dout.dtype), dout, w_proj, post)
    c = None
    if normed:
        c = torch.empty(triton.cdiv(N, tile["BLOCK_N"]), M, dtype=torch.float32, device=post.device)
    if tile.get("persistent"):
        grid, factors, options = persistent_launch(dout, w_proj, tile)
        _proj_bwd_tma_kernel[grid](*factors, rstd, half_blocks(post, tile), c, M, N, K, HAS_NORM=normed, **options)
    else:
        _proj_bwd_kernel[gemm_grid(M, N, tile)](
            dout, w_proj, rstd, post, c, dout.stride(0), dout.stride(1), w_proj.stride(0), w_proj.stride(1), M, N, K,
            HAS_NORM=normed, **launch_options(tile, K),
        )  # fmt: skip
    torch.autograd.graph.increment_version(post)
    return post, c


def _norm_fc_bwd(dz: Tensor, w_fc: Tensor, x: Tensor, dout: Tensor, rstd: Tensor, c: Tensor) -> Tensor:
    """dout + dz·W_fc − x·rstd²·c/D: [M, D]."""
    (M, K), N = dz.shape, w_fc.shape[1]
    dx = torch.empty(M, N, dtype=x.dtype, device=x.device)
    tile = FC_BACKWARD(N, K, x.dtype)
    _norm_fc_bwd_kernel[gemm_grid(M, N, tile)](
        dz, w_fc, x, dout, rstd, c, dx, dz.stride(0), dz.stride(1), w_fc.stride(0), w_fc.stride(1), x.stride(0),
        dout.stride(0), M, N, K, c.shape[0], **launch_options(tile, K),
    )  # fmt: skip
    return dx


def _check(x: Tensor, w_fc: Tensor, w_proj: Tensor, residual: Tensor | None) -> None:
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"x: {x.dtype}, the kernels take float32, float16 and bfloat16")
    for name, tensor in (("w_fc", w_fc), ("w_proj", w_proj), ("residual", residual)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(f"{name}: {tensor.dtype}, x has {x.dtype}")
    if w_fc.dim() != 2 or w_fc.shape[1] != x.shape[-1] or w_proj.shape != (w_fc.shape[1], w_fc.shape[0]):
        raise ValueError(f"w_fc {tuple(w_fc.shape)} and w_proj {tuple(w_proj.shape)}: expected [F, D] and [D, F]")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual: {tuple(residual.shape)}, x has {tuple(x.shape)}")
    if residual is None and x.stride(-1) != 1 and x.shape[-1] != 1:
        raise ValueError(f"x: stride {x.stride(-1)} along the last dimension, the kernels need 1 to norm it")


class _Relu2MLP(torch.autograd.Function):
    """Without a residual, the norm is inside and the residual is x."""

    @staticmethod
    def forward(ctx, x, w_fc, w_proj, residual, main_grad_fc, main_grad_proj, recompute, overwrite):
        _check(x, w_fc, w_proj, residual)
        rows = x.reshape(-1, x.shape[-1])
        rstd = _rstd(rows) if residual is None else None
        post = _fc_fwd(rows, w_fc, rstd)
        stream = rows if residual is None else residual.reshape(rows.shape)
        # Overwritten through an alias: the stream may be a view that another op has made, which autograd would refuse.
        out = product(post, w_proj.mT, stream.detach() if overwrite else stream, overwrite)
        ctx.save_for_backward(rows, rstd, None if recompute else post, w_fc, w_proj)
        ctx.main_grads = main_grad_fc, main_grad_proj
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, rstd, post, w_fc, w_proj = ctx.saved_tensors
        needs_dx, needs_dw_fc, needs_dw_proj, needs_dresidual, *_ = ctx.needs_input_grad
        main_grad_fc, main_grad_proj = ctx.main_grads
        rows = dout.reshape(x.shape)
        dx = dw_fc = dw_proj = None
        recomputed = post is None
        if recomputed:
            post = _fc_fwd(x, w_fc, rstd)
        if needs_dw_proj:
            dw_proj = weight_grad(rows, post, main_grad_proj)
        if needs_dx or needs_dw_fc:
            if not recomputed and graph_is_kept():
                post = post.clone()
            dz, c = _proj_bwd_(rows, w_proj, post, rstd)
            if needs_dw_fc:
                dw_fc = weight_grad(dz, x, main_grad_fc)
            if needs_dx:
                dx = product(dz, w_fc) if rstd is None else _norm_fc_bwd(dz, w_fc, x, rows.contiguous(), rstd, c)
                dx = dx.view(dout.shape)
        return dx, dw_fc, dw_proj, dout if needs_dresidual else None, None, None, None, None


def _norm_relu2_mlp_cpu(x: Tensor, w_fc: Tensor, w_proj: Tensor) -> Tensor:
    return relu2_mlp_cpu(rms_norm_cpu(x)[1], w_fc, w_proj, x)


def _run(
    plain: Callable, x: Tensor, w_fc: Tensor, w_proj: Tensor, residual: Tensor | None, recompute: bool,
    overwrite: bool = False,
) -> Tensor:  # fmt: skip
    if not use_kernels(x):
        inputs = (x, w_fc, w_proj) if residual is None else (x, w_fc, w_proj, residual)
        if recompute and torch.is_grad_enabled():
            return checkpoint(plain, *inputs, use_reentrant=False, preserve_rng_state=False)
        return plain(*inputs)
    main_grads = getattr(w_fc, "main_grad", None), getattr(w_proj, "main_grad", None)
    overwrite = overwrite and residual.is_contiguous()
    return _Relu2MLP.apply(x, w_fc, w_proj, residual, *main_grads, recompute, overwrite)


def relu2_mlp(
    x: Tensor | Factors, w_fc: Tensor, w_proj: Tensor, residual: Tensor, recompute: bool = False,
    overwrite: bool = False,
) -> Tensor:  # fmt: skip
    """The feed-forward block with its residual.

    Args:
        x: [..., D], the normed stream; or the factors of it from `norm_factors`, without rstd: then this is
            `norm_relu2_mlp` of their stream, which is to be `residual` too, and stays as it is.
        w_fc: [F, D]; w_proj: [D, F]. Where one carries `main_grad`, its gradient is added there.
        residual: [..., D], the stream itself.
        recompute: keep nothing of width F for the backward, and make it again there: the same bits.
        overwrite: nobody needs `residual` any more: the kernels may write over it, if it is contiguous.

    Returns:
        [..., D].

    Raises:
        ValueError: shapes, dtypes or strides that the kernels do not take; factors of another stream, or with rstd.
    """
    if isinstance(x, Factors):
        if x.rstd is not None or x.stream is not residual:
            raise ValueError("x: only the factors that `norm_factors(residual)` returns, without x0")
        return norm_relu2_mlp(residual, w_fc, w_proj, recompute)
    plain = relu2_mlp_cpu if use_cpu_forms() else relu2_mlp_ref
    return _run(plain, x, w_fc, w_proj, residual, recompute, overwrite)


def norm_relu2_mlp(x: Tensor, w_fc: Tensor, w_proj: Tensor, recompute: bool = False) -> Tensor:
    """The same block on the stream itself, [..., D], which it norms and which is its residual; its arguments and errors
    are those of `relu2_mlp`. Not yet timed."""
    plain = _norm_relu2_mlp_cpu if use_cpu_forms() else norm_relu2_mlp_ref
    return _run(plain, x, w_fc, w_proj, None, recompute)


def cost(
    rows: int, width: int, hidden: int, norm: bool = False, itemsize: int = 2, backward: bool = False
) -> tuple[int, int]:
    """Bytes that have to move and FLOPs of all the block's products, for [rows, width] and [hidden, width].

    A weight counts once a product, its fp32 gradient as read and written. With `norm`, of `norm_relu2_mlp`.
    """
    product, weight = 2 * rows * width * hidden, width * hidden
    if not backward:  # x, post written and read, residual, out; x once more for rstd
        return (rows * ((3 + norm) * width + 2 * hidden) + 2 * weight) * itemsize, 2 * product
    # dout and post for dz, which is written; dz for dx, which is written; dz and x for dW_fc; dout and post for dW_proj
    # (with the norm, dx takes x and dout too)
    activations = rows * ((4 + 2 * norm) * width + 5 * hidden) * itemsize
    return activations + weight * (2 * itemsize + 2 * 8), 4 * product
