"""A matrix product with nothing fused but the residual: y = x·Wᵀ (+ residual).

x: [..., K], W: [N, K], y and residual: [..., N]. Backward: dx = dy·W;  dW = dyᵀ·x, added in fp32 to `W.main_grad` where
there is one;  dresidual = dy, the same tensor.

Saved: x and W. Bytes per token in 16 bits: 2(K + N) forward, and 2N more for the residual; 4(K + N) backward. FLOPs per
token: 2KN forward, 4KN backward. PyTorch's `addmm` copies the residual into y before its GEMM adds to it, which moves
another 4N bytes; with `overwrite` the residual becomes y, and nothing is copied.

y and dx are the vendor's products. Those of this file, which copy no residual, are there to be tried against them shape
by shape: no speed has been measured yet.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .choice import Choice, Tile
from .common import tl, triton, use_kernels
from .gemm import (
    column_halves,
    fitting_tile,
    gemm_candidates,
    gemm_grid,
    gemm_tile,
    gemm_tile_tma,
    half_blocks,
    launch_options,
    persistent_candidates,
    persistent_launch,
    tile_at,
    tile_offsets,
)
from .weight_grad import weight_grad


def linear_ref(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    y = F.linear(x, weight)
    return y if residual is None else residual + y


@triton.jit
def _linear_kernel(
    a_ptr, b_ptr, residual_ptr, y_ptr, a_stride_m, a_stride_k, b_stride_k, b_stride_n, residual_stride_m,
    residual_stride_n, M, N, K, HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """y = a·b, or residual + a·b, which may take the residual's memory."""
    offs_m, offs_n = tile_offsets(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    acc = gemm_tile(
        a_ptr, b_ptr, a_stride_m, a_stride_k, b_stride_k, b_stride_n, offs_m, offs_n, M, N, K,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K,
    )  # fmt: skip
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    if HAS_RESIDUAL:
        residual_ptrs = residual_ptr + offs_m[:, None] * residual_stride_m + offs_n[None, :] * residual_stride_n
        acc += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _linear_half(acc, residual_desc, y_desc, first_m, first_n, HAS_RESIDUAL: tl.constexpr):
    """One half of a tile of y. In place of the residual it is safe: the load has come back before there is anything to
    store, and no other load of the launch is of these elements."""
    if HAS_RESIDUAL:
        acc += residual_desc.load([first_m, first_n]).to(tl.float32)
    y_desc.store([first_m, first_n], acc.to(y_desc.dtype))


@triton.jit
def _linear_tma_kernel(
    a_desc, b_desc, residual_desc, y_desc, M, N, K, HAS_RESIDUAL: tl.constexpr, B_BY_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """What `_linear_kernel` computes, persistent."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        tile_m, tile_n = tile_at(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        first_m, first_n = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = gemm_tile_tma(a_desc, b_desc, first_m, first_n, K, B_BY_K, BLOCK_M, BLOCK_N, BLOCK_K)
        left, right = column_halves(acc, BLOCK_M, BLOCK_N)
        _linear_half(left, residual_desc, y_desc, first_m, first_n, HAS_RESIDUAL)
        _linear_half(right, residual_desc, y_desc, first_m, first_n + BLOCK_N // 2, HAS_RESIDUAL)


def _vendor(N: int, K: int, dtype: torch.dtype) -> Tile:
    return {"way": "vendor"}


def _candidates(N: int, K: int, dtype: torch.dtype) -> list[Tile]:
    tiles = gemm_candidates(N, K, dtype) + persistent_candidates(N, K, dtype)
    return [{"way": "triton", **tile} for tile in tiles]


_KERNELS = _linear_kernel, _linear_tma_kernel
# Of a product [rows, K]·[K, N]: (N, K, dtype). y and dx, since their factors lie differently in memory.
FORWARD = Choice("linear-forward", _KERNELS, _vendor, _candidates)
BACKWARD = Choice("linear-backward", _KERNELS, _vendor, _candidates)


def _product(choice: Choice, a: Tensor, b: Tensor, residual: Tensor | None = None, overwrite: bool = False) -> Tensor:
    """a·b, or residual + a·b: [M, N]; with `overwrite` in the memory of the residual, which is contiguous."""
    (M, K), N = a.shape, b.shape[1]
    others = () if residual is None else (residual,)
    tile = fitting_tile(choice, a, b, *others)
    if tile["way"] == "vendor":
        if residual is None:
            return torch.mm(a, b)
        return residual.addmm_(a, b) if overwrite else torch.addmm(residual, a, b)
    tile = {key: value for key, value in tile.items() if key != "way"}
    y = residual if overwrite else torch.empty(M, N, dtype=a.dtype, device=a.device)
    has_residual = residual is not None
    if tile.get("persistent"):
        grid, factors, options = persistent_launch(a, b, tile)
        blocks = [None if x is None else half_blocks(x, tile) for x in (residual, y)]
        _linear_tma_kernel[grid](*factors, *blocks, M, N, K, HAS_RESIDUAL=has_residual, **options)
    else:
        strides = residual.stride() if has_residual else (0, 0)
        _linear_kernel[gemm_grid(M, N, tile)](
            a, b, residual, y, a.stride(0), a.stride(1), b.stride(0), b.stride(1), *strides, M, N, K,
            HAS_RESIDUAL=has_residual, **launch_options(tile, K),
        )  # fmt: skip
    return y


def _check(x: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)}: expected [..., K] and [N, K]")
    out_shape = (*x.shape[:-1], weight.shape[0])
    if residual is not None and residual.shape != out_shape:
        raise ValueError(f"residual: {tuple(residual.shape)}, expected {out_shape}")
    dtypes = {t.dtype for t in (x, weight, residual) if t is not None}
    if len(dtypes) != 1:
        raise ValueError(f"x, weight and residual must have one dtype, got {sorted(map(str, dtypes))}")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, residual, main_grad, overwrite):
        _check(x, weight, residual)
        N, K = weight.shape
        rows = x.reshape(-1, K)
        stream = None if residual is None else residual.reshape(-1, N)  # a view, where it is to be overwritten
        y = _product(FORWARD, rows, weight.mT, stream, overwrite)
        if overwrite:
            ctx.mark_dirty(residual)
            y = residual
        ctx.save_for_backward(rows, weight)
        ctx.main_grad = main_grad
        ctx.x_shape = x.shape
        return y if y is residual else y.view(*x.shape[:-1], N)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        needs_dx, needs_dw, needs_dresidual, *_ = ctx.needs_input_grad
        rows = dy.reshape(-1, weight.shape[0])
        dx = _product(BACKWARD, rows, weight).view(ctx.x_shape) if needs_dx else None
        dw = weight_grad(rows, x, ctx.main_grad) if needs_dw else None
        return dx, dw, dy if needs_dresidual else None, None, None


def linear(x: Tensor, weight: Tensor, residual: Tensor | None = None, overwrite: bool = False) -> Tensor:
    """A linear layer without bias, its residual added before the one rounding.

    Args:
        x: [..., K], its rows evenly spaced or else copied; weight: [N, K]; residual: [..., N] or None; of one dtype.
            Where `weight` carries `main_grad`, its gradient is added there.
        overwrite: nobody needs `residual` any more: the kernels may write over it, if it is contiguous.

    Returns:
        [..., N].

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    if not use_kernels(x):
        return linear_ref(x, weight, residual)
    overwrite = overwrite and residual is not None and residual.is_contiguous()
    return _Linear.apply(x, weight, residual, getattr(weight, "main_grad", None), overwrite)


def cost(
    rows: int, in_width: int, out_width: int, residual: bool = False, itemsize: int = 2, backward: bool = False
) -> tuple[int, int]:
    """Bytes that have to move and FLOPs, for [rows, in_width] times [out_width, in_width] transposed.

    The weight counts once a product, its fp32 gradient as read and written.
    """
    product = rows * in_width * out_width * 2
    activations, weights = rows * (in_width + out_width) * itemsize, in_width * out_width
    if not backward:
        return activations + rows * out_width * residual * itemsize + weights * itemsize, product
    return 2 * activations + weights * (itemsize + 8), 2 * product
