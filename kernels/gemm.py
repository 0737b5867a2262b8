"""The tile of a matrix product, for ops that put something of their own into its epilogue.

C = A·B, A: [M, K], B: [K, N]; a transposed factor is the same memory with its strides exchanged. Sums are fp32. Rows
past M, N or K read as zero. There are two forms, and a tile says which it is for.

Portable: a program computes one [BLOCK_M, BLOCK_N] tile, of factors with any strides.

Persistent ("persistent" in the tile): as many programs as the GPU holds at once walk over all tiles, and the first
loads of the next tile are under way in the epilogue of this one. The tensor memory accelerator (TMA) of Hopper and
later loads and stores; it wants rows at multiples of 16 bytes. The epilogue takes half of a tile's columns at a time,
for want of registers and shared memory. Which program computes a tile changes none of its bits. Not yet timed.
"""

import torch
from torch import Tensor

from .choice import Choice, Tile
from .common import gpu_arch, tl, triton

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # no Triton, no kernels
    TensorDescriptor = None

__all__ = [
    "column_halves",
    "few_gemm_candidates",
    "fits_tma",
    "fitting_tile",
    "gemm_candidates",
    "gemm_config",
    "gemm_grid",
    "gemm_tile",
    "gemm_tile_tma",
    "half_blocks",
    "launch_options",
    "persistent_candidates",
    "persistent_launch",
    "tile_at",
    "tile_index",
    "tile_offsets",
]

GROUP_M = 8  # rows of tiles that share their columns of B while these are in the L2


@triton.jit
def tile_at(number, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Where the tile of this number is: down, and right. Neighbours walk down GROUP_M tiles, then right."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = number // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    rows_in_group = tl.minimum(tiles_m - first_m, GROUP_M)
    within = number % (GROUP_M * tiles_n)
    return first_m + within % rows_in_group, within // rows_in_group


@triton.jit
def tile_index(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Which tile is this program's, in the portable form."""
    return tile_at(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)


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


@triton.jit
def gemm_tile_tma(
    a_desc, b_desc, first_m, first_n, K,
    B_BY_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The sums over K of the tile that begins there, [BM, BN] in fp32; of factors as `persistent_launch` gives them."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        a = a_desc.load([first_m, start])
        if B_BY_K:
            b = b_desc.load([start, first_n])
        else:
            b = b_desc.load([first_n, start]).T
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def column_halves(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of a tile's columns, [BM, BN / 2] each: no number changes its thread."""
    return acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()


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


def _tile(block_m: int, block_n: int, block_k: int, num_warps: int = 8, *, num_stages: int) -> Tile:
    return {
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": num_warps, "num_stages": num_stages,
    }  # fmt: skip


def _in_shared(tile: Tile) -> bool:
    """Whether its stages, in 16 bits, fit into what a program may have of shared memory here; the compiler may make do
    with one less. Source of the limits: the CUDA programming guide's table of compute capabilities."""
    kib = {80: 163, 90: 227, 100: 227, 103: 227}.get(gpu_arch(), 99)
    return (tile["BLOCK_M"] + tile["BLOCK_N"]) * tile["BLOCK_K"] * 2 * tile["num_stages"] <= kib * 1024


def gemm_candidates(N: int, K: int, dtype: torch.dtype, tight: bool = False) -> list[Tile]:
    """To be tried in place of `gemm_config`, at most 16. `tight`: the epilogue holds more than the sums.

    A thread's share of the sums is 64 or 128 registers: with less, a factor's elements are read too often, with more
    they spill.
    """
    if dtype.itemsize > 2 or N % 16 or K % 16:
        return []
    sizes = [(64, 128, 4), (128, 64, 4), (64, 256, 4), (256, 64, 4), (128, 128, 4), (128, 128, 8), (128, 256, 8),
             (256, 128, 8)]  # fmt: skip
    pipelines = [(64, 3), (64, 4)] if _in_shared(_tile(128, 256, 64, num_stages=3)) else [(32, 4), (64, 3)]
    tiles = [
        _tile(block_m, block_n, block_k, num_warps, num_stages=num_stages)
        for block_m, block_n, num_warps in sizes if not tight or block_m * block_n <= 64 * 32 * num_warps
        for block_k, num_stages in pipelines
    ]  # fmt: skip
    return [tile for tile in tiles if _in_shared(tile)]


def few_gemm_candidates(N: int, K: int, dtype: torch.dtype) -> list[Tile]:
    """At most four portable tiles, for products of which a step has many: `gemm_config`'s, and the largest that fit."""
    if dtype.itemsize > 2 or N % 16 or K % 16:
        return []
    largest = [(128, 256, 64, 3), (256, 128, 64, 3), (128, 128, 64, 4),
               (128, 256, 32, 4), (256, 128, 32, 4), (128, 128, 64, 3)]  # fmt: skip
    tiles = [_tile(*blocks, num_stages=num_stages) for *blocks, num_stages in largest]
    return [gemm_config(N, K, dtype), *[tile for tile in tiles if _in_shared(tile)][:3]]


def persistent_candidates(N: int, K: int, dtype: torch.dtype) -> list[Tile]:
    """Persistent tiles to be tried, by registers, spills and shared memory in the epilogues of the ops."""
    if dtype.itemsize > 2 or N % 8 or K % 8:
        return []
    tiles = {
        90: [(128, 256, 64, 8, 3), (256, 128, 64, 8, 3), (128, 256, 32, 8, 4), (128, 128, 64, 4, 3),
             (128, 128, 64, 4, 2), (128, 128, 64, 8, 2)],
        100: [(128, 256, 64, 8, 3), (256, 128, 64, 8, 3), (128, 128, 64, 4, 3), (128, 128, 64, 8, 3)],
        120: [(128, 128, 64, 8, 2), (128, 128, 32, 8, 3), (128, 64, 64, 4, 2), (64, 128, 64, 4, 2)],
    }  # fmt: skip
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    arch = {103: 100}.get(gpu_arch(), gpu_arch())
    return [{**dict(zip(names, tile, strict=True)), "persistent": True} for tile in tiles.get(arch, [])]


def fits_tma(*matrices: Tensor) -> bool:
    """Whether TMA takes these [rows, columns]: none empty, and each row contiguous, after the one before it, and at a
    multiple of 16 bytes."""
    return gpu_arch() not in range(1, 90) and all(
        x.numel() > 0 and x.stride(1) == 1 and x.stride(0) >= x.shape[1]
        and x.stride(0) * x.itemsize % 16 == 0 and x.data_ptr() % 16 == 0
        for x in matrices
    )  # fmt: skip


def fitting_tile(choice: Choice, shape: tuple, a: Tensor, b: Tensor, *others: Tensor) -> Tile:
    """What `choice` gives at `shape` for a·b, a: [M, K], b: [K, N]. Its default, which is never persistent, where that
    is and TMA does not take them, `others`, or a contiguous result."""
    tile = choice(*shape)
    if not tile.get("persistent"):
        return tile
    fits = fits_tma(a, *others) and (fits_tma(b) or fits_tma(b.mT)) and b.shape[1] * b.itemsize % 16 == 0
    return tile if fits else choice.default(*shape)


def _programs(device: torch.device, block_m: int, block_n: int) -> int:
    """How many a GPU may hold at once: the sums of 128 x 256 are half of a multiprocessor's registers, and what else a
    program needs takes the other half."""
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return multiprocessors * max(1, 128 * 256 // (block_m * block_n))


def launch_options(tile: Tile, K: int) -> Tile:
    """What a portable kernel takes of its tile."""
    return {**tile, "GROUP_M": GROUP_M, "EVEN_K": K % tile["BLOCK_K"] == 0}


def persistent_launch(a: Tensor, b: Tensor, tile: Tile) -> tuple[tuple[int], tuple, Tile]:
    """Grid, factors and options for a persistent kernel of a·b, a: [M, K], b: [K, N], by a tile of `fitting_tile`."""
    options = {key: value for key, value in tile.items() if key != "persistent"}
    block_m, block_n, block_k = (tile[f"BLOCK_{side}"] for side in "MNK")
    by_k = fits_tma(b)
    factors = (
        TensorDescriptor.from_tensor(a, [block_m, block_k]),
        TensorDescriptor.from_tensor(b if by_k else b.mT, [block_k, block_n] if by_k else [block_n, block_k]),
    )
    (tiles,) = gemm_grid(a.shape[0], b.shape[1], tile)
    grid = (min(tiles, _programs(a.device, block_m, block_n)),)
    return grid, factors, {**options, "GROUP_M": GROUP_M, "B_BY_K": by_k}


def half_blocks(x: Tensor, tile: Tile) -> "TensorDescriptor":
    """`x` [M, N] by what an epilogue takes at a time."""
    return TensorDescriptor.from_tensor(x, [tile["BLOCK_M"], tile["BLOCK_N"] // 2])


def gemm_grid(M: int, N: int, config: Tile) -> tuple[int]:
    return (triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"]),)
