"""a·b, or residual + a·b: every product of an op that fuses nothing into it but the residual is made here.

a: [M, K]; b: [K, N], as it lies or transposed; residual and the result: [M, N]. The sum with the residual is rounded
once. Who multiplies is chosen shape by shape: the vendor's product, which is the default, or the kernels of this file.
Those copy no residual, where PyTorch's `addmm` writes one into the result before its GEMM adds to it; over the residual
itself neither does. No speed has been measured yet.

Bytes in 16 bits: 2(MK + KN + MN), and 2MN more for the residual. FLOPs: 2MNK.
"""

import torch
from torch import Tensor

from .choice import Choice, Tile
from .common import tl, triton
from .gemm import (
    column_halves,
    few_gemm_candidates,
    fitting_tile,
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

__all__ = ["PRODUCT", "product"]


@triton.jit
def _product_kernel(
    a_ptr, b_ptr, residual_ptr, y_ptr, a_stride_m, a_stride_k, b_stride_k, b_stride_n, residual_stride_m,
    residual_stride_n, y_stride_m, y_stride_n, M, N, K, HAS_RESIDUAL: tl.constexpr,
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
    y_ptrs = y_ptr + offs_m[:, None] * y_stride_m + offs_n[None, :] * y_stride_n
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _product_half(acc, residual_desc, y_desc, first_m, first_n, HAS_RESIDUAL: tl.constexpr):
    """One half of a tile of y. In place of the residual it is safe: the load has come back before there is anything to
    store, and no other load of the launch is of these elements."""
    if HAS_RESIDUAL:
        acc += residual_desc.load([first_m, first_n]).to(tl.float32)
    y_desc.store([first_m, first_n], acc.to(y_desc.dtype))


@triton.jit
def _product_tma_kernel(
    a_desc, b_desc, residual_desc, y_desc, M, N, K, HAS_RESIDUAL: tl.constexpr, B_BY_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """What `_product_kernel` computes, persistent."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        tile_m, tile_n = tile_at(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        first_m, first_n = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = gemm_tile_tma(a_desc, b_desc, first_m, first_n, K, B_BY_K, BLOCK_M, BLOCK_N, BLOCK_K)
        left, right = column_halves(acc, BLOCK_M, BLOCK_N)
        _product_half(left, residual_desc, y_desc, first_m, first_n, HAS_RESIDUAL)
        _product_half(right, residual_desc, y_desc, first_m, first_n + BLOCK_N // 2, HAS_RESIDUAL)


def _vendor(N: int, K: int, dtype: torch.dtype, by_k: bool, with_residual: bool) -> Tile:
    return {"way": "vendor"}


def _candidates(N: int, K: int, dtype: torch.dtype, by_k: bool, with_residual: bool) -> list[Tile]:
    tiles = few_gemm_candidates(N, K, dtype) + persistent_candidates(N, K, dtype)
    return [{"way": "triton", **tile} for tile in tiles]


# (N, K, dtype, by_k, with_residual). by_k: b lies in memory row by row, as in dy·W; in x·Wᵀ it does not.
PRODUCT = Choice("product", [_product_kernel, _product_tma_kernel], _vendor, _candidates)


def product(
    a: Tensor, b: Tensor, residual: Tensor | None = None, overwrite: bool = False, out: Tensor | None = None
) -> Tensor:
    """a·b, or residual + a·b.

    Args:
        a: [M, K]; b: [K, N]; residual: [M, N] or None; of one dtype and any strides.
        overwrite: the residual's memory becomes the result's; then there is no `out`.
        out: [M, N], any strides, apart from the others: where the result goes.

    Returns:
        [M, N]: the residual itself with `overwrite`, `out` where it is given, else a new one. What was written over has
        another version, for autograd to find.
    """
    N, K, dtype = b.shape[1], a.shape[1], a.dtype
    place = residual if overwrite else out
    others = [x for x in (residual, out) if x is not None]
    tile = fitting_tile(PRODUCT, (N, K, dtype, b.stride(1) == 1, residual is not None), a, b, *others)
    if tile["way"] == "triton":
        return _by_kernels(a, b, residual, place, tile)
    if residual is None:
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
    if overwrite:
        return residual.addmm_(a, b)
    return torch.addmm(residual, a, b) if out is None else torch.addmm(residual, a, b, out=out)


def _by_kernels(a: Tensor, b: Tensor, residual: Tensor | None, place: Tensor | None, tile: Tile) -> Tensor:
    (M, K), N = a.shape, b.shape[1]
    tile = {key: value for key, value in tile.items() if key != "way"}
    has_residual = residual is not None
    y = torch.empty(M, N, dtype=a.dtype, device=a.device) if place is None else place
    if tile.get("persistent"):
        grid, factors, options = persistent_launch(a, b, tile)
        blocks = [None if x is None else half_blocks(x, tile) for x in (residual, y)]
        _product_tma_kernel[grid](*factors, *blocks, M, N, K, HAS_RESIDUAL=has_residual, **options)
    else:
        strides = *a.stride(), *b.stride(), *(residual.stride() if has_residual else (0, 0)), *y.stride()
        _product_kernel[gemm_grid(M, N, tile)](
            a, b, residual, y, *strides, M, N, K, HAS_RESIDUAL=has_residual, **launch_options(tile, K)
        )
    if place is not None:
        torch.autograd.graph.increment_version(place)
    return y
