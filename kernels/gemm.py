"""The tile of a matrix product, for ops that put something of their own into its epilogue.

A program computes one [BLOCK_M, BLOCK_N] tile of C = A·B, A: [M, K], B: [K, N], any strides: a transposed factor is
the same memory with its strides exchanged. Sums are fp32. Rows past M, N or K read as zero.
"""

import torch

from .choice import Tile, product_tiles
from .common import gpu_arch, tl, triton

__all__ = ["gemm_candidates", "gemm_config", "gemm_grid", "gemm_tile", "tile_index", "tile_offsets"]

GROUP_M = 8  # rows of tiles that share their columns of B while these are in the L2


@triton.jit
def tile_index(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Which tile is this program's: down, and right. Neighbours walk down GROUP_M tiles, then right."""
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    rows_in_group = tl.minimum(tiles_m - first_m, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    return first_m + within % rows_in_group, within // rows_in_group


@triton.jit
def tile_offsets(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Rows [BM] and columns [BN] of this program's tile, int64."""
    tile_m, tile_n = tile_index(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    return offs_m, offs_n


@triton.jit
def gemm_tile(
    a_ptr, b_ptr, a_stride_m, a_stride_k, b_stride_k, b_stride_n, offs_m, offs_n, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """The tile's sums over K, [BM, BN] in fp32."""
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = (offs_m < M)[:, None]
    mask_n = (offs_n < N)[None, :]
    a_ptrs = a_ptr + offs_m[:, None] * a_stride_m + offs_k[None, :] * a_stride_k  # [BM, BK]
    b_ptrs = b_ptr + offs_k[:, None] * b_stride_k + offs_n[None, :] * b_stride_n  # [BK, BN]
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_ptrs, mask=mask_m, other=0.0)
            b = tl.load(b_ptrs, mask=mask_n, other=0.0)
        else:
            mask_k = offs_k < K - start
            a = tl.load(a_ptrs, mask=mask_m & mask_k[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=mask_k[:, None] & mask_n, other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        a_ptrs += BLOCK_K * a_stride_k
        b_ptrs += BLOCK_K * b_stride_k
    return acc


def gemm_config(N: int, K: int, dtype: torch.dtype) -> Tile:
    """Tile sizes, warps and stages, so that nothing spills and the stages fit: no speed has been measured yet.

    Hopper has 227 KiB of shared memory a multiprocessor. A long K takes the largest tile (144 KiB, all registers); a
    short one takes half of it twice (2 x 96 KiB), so that one program's epilogue runs beside the other's products.
    """
    if dtype == torch.float32:  # exact products run on the ordinary cores, with both factors in registers
        return _tile(64, 64, 16, num_stages=2)
    if N % 16 or K % 16:  # such rows are not aligned: elements are loaded one by one, each with an address of its own
        return _tile(64, 64, 32, num_stages=2)
    arch = gpu_arch()
    if arch == 90 and K > 1024:
        return _tile(128, 256, 64, num_stages=3)
    if arch in (90, 100, 103):
        return _tile(128, 128, 64, num_stages=3)
    return _tile(128, 128, 32, num_stages=4)  # at most 64 KiB: every chip from Ampere on has 99


def _tile(block_m: int, block_n: int, block_k: int, num_stages: int) -> Tile:
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": 8, "num_stages": num_stages}


def gemm_candidates(N: int, K: int, dtype: torch.dtype, tight: bool = False) -> list[Tile]:
    """To be tried in place of `gemm_config`. `tight`: the epilogue holds more than the sums."""
    if dtype.itemsize > 2 or N % 16 or K % 16:
        return []
    sizes = (64, 128, 256)
    tiles = product_tiles(((32, 5), (64, 3), (64, 4), (128, 2)), BLOCK_M=sizes, BLOCK_N=sizes)
    return [tile for tile in tiles if not tight or tile["BLOCK_M"] * tile["BLOCK_N"] <= 64 * 32 * tile["num_warps"]]


def gemm_grid(M: int, N: int, config: Tile) -> tuple[int]:
    return (triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"]),)
