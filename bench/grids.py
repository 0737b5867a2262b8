"""The tiles that `bench.tune` tries: those that a Hopper GPU may like. What does not compile there, spills or does not
fit is left to the compiler to say.
"""

from collections.abc import Callable, Iterable
from itertools import product

Tile = dict[str, int]


def grid(accept: Callable[[Tile], bool] = lambda tile: True, **values: Iterable) -> list[Tile]:
    found = [dict(zip(values, choice, strict=True)) for choice in product(*values.values())]
    return [tile for tile in found if accept(tile)]


def elements(of: Callable[[Tile], int], least: int, most: int) -> Callable[[Tile], bool]:
    """Whether a thread has from `least` to `most` of a tile's elements: vectors of 16 bytes, and registers to spare."""
    return lambda tile: least <= of(tile) // (32 * tile["num_warps"]) <= most


def product_tiles(pipelines: tuple[tuple[int, int], ...], **values: Iterable) -> list[Tile]:
    """Tiles of a product: the given sizes, 4 or 8 warps, and (BLOCK_K, stages).

    A thread's share of the fp32 sums is 64 or 128 registers: with less, a factor's elements are read too often, with
    more they spill. Stages have to fit into 227 KiB.
    """
    sides = list(values)

    def area(tile):
        return tile[sides[0]] * tile[sides[-1]]

    return [
        {**tile, "BLOCK_K": block_k, "num_stages": stages}
        for tile in grid(elements(area, 64, 128), **values, num_warps=(4, 8))
        for block_k, stages in pipelines
        if (tile[sides[0]] + tile[sides[-1]]) * block_k * 2 * stages <= 227 * 1024
    ]


SIZES = (64, 128, 256)
GEMM = product_tiles(((32, 5), (64, 3), (64, 4), (128, 2)), BLOCK_M=SIZES, BLOCK_N=SIZES)
# What they leave out spilled hundreds of bytes a thread, or took more than 227 KiB (bench/LOG.md, 2026-11-24).
ATTENTION = grid(
    lambda tile: tile["block_m"] * min(tile["block_n"], 64) <= 1024 * tile["num_warps"]
    and tile["block_n"] * tile["num_stages"] < 512,
    block_m=(64, 128), block_n=(32, 64, 128), num_warps=(4, 8), num_stages=(2, 3, 4), tma=(True, False),
)  # fmt: skip
ATTENTION_DKV = grid(
    lambda tile: tile["block_m"] * tile["block_n"] <= 2048 or tile["num_warps"] == 8,
    block_m=(32, 64), block_n=(64, 128), num_warps=(4, 8), num_stages=(1, 2, 3, 4),
)  # fmt: skip
NORM_GEMM = [tile for tile in GEMM if tile["BLOCK_M"] * tile["BLOCK_N"] <= 64 * 32 * tile["num_warps"]]
PROLOGUE = grid(rows=(16, 32, 64), num_warps=(2, 4, 8))
SYMMETRIC = product_tiles(((32, 4), (64, 2), (64, 3), (64, 4), (128, 2)), BLOCK=(64, 128))
LAST = product_tiles(((64, 3), (64, 4), (128, 2)), BLOCK_M=(64, 128), BLOCK_N=SIZES)
# Those of the norms are for rows of 512.
NORM = grid(elements(lambda tile: tile["BLOCK_M"] * 512, 4, 64), BLOCK_M=(1, 2, 4, 8, 16), num_warps=(1, 2, 4, 8))
NORM_BACKWARD = grid(
    elements(lambda tile: tile["BLOCK_M"] * 512, 8, 32), BLOCK_M=(1, 2, 4, 8), num_warps=(1, 2, 4, 8),
    STEPS=(4, 8, 16),
)  # fmt: skip
EMBEDDING = grid(
    elements(lambda tile: tile["BLOCK"] * tile["BLOCK_D"], 16, 32), BLOCK=(4, 8, 16, 32), BLOCK_D=(128, 256, 512),
    num_warps=(1, 2, 4, 8),
)  # fmt: skip
MUON = grid(
    elements(lambda tile: tile["BLOCK_R"] * tile["BLOCK_C"], 8, 32), BLOCK_R=(2, 4, 8, 16), BLOCK_C=(128, 256, 512),
    num_warps=(4, 8),
)  # fmt: skip
MEANS = grid(
    elements(lambda tile: tile["BLOCK_L"] * tile["BLOCK_N"], 8, 32), BLOCK_L=(2, 4, 8, 16), BLOCK_N=(128, 256, 512),
    num_warps=(2, 4, 8),
)  # fmt: skip
ADAMW = grid(
    lambda tile: 4 <= tile["BLOCK"] // (32 * tile["NUM_WARPS"]) <= 16, BLOCK=(512, 1024, 2048, 4096),
    NUM_WARPS=(2, 4, 8, 16),
)  # fmt: skip
