"""Which tiles of the score matrix a causal window touches, and how large the tiles are.

A row of tiles falls into three runs: tiles that an edge of the window cuts (masked), tiles wholly inside (no mask at
all), and tiles that the other edge cuts (masked). Tiles outside the window are in none of them. The two functions that
compute the runs are plain arithmetic: the tests run them as Python too, and hold them against the window itself.
"""

from typing import NamedTuple

import torch

from ..choice import Tile, grid
from ..common import gpu_arch, tl, triton


class Tiles(NamedTuple):
    """Tile of one kernel: queries by keys, and how Triton is to compile it."""

    block_m: int  # queries
    block_n: int  # keys
    num_warps: int
    num_stages: int
    tma: bool = False  # of queries that stay and keys that pass: loads by the tensor memory accelerator

    def both_edges(self, window: int) -> bool:
        """Whether both edges of the window may cut one tile: then the tiles at its far edge need both masks. `window`
        as the kernel gets it, no more than seq_len: that edge is where `key_runs` puts it."""
        return window < self.block_m + self.block_n


class Rows(NamedTuple):
    """Tile of the prologue. It works in place, and no element may have two threads: rows·head_dim / 2, which are held
    at once, must be no fewer than threads."""

    rows: int  # tokens a program
    num_warps: int


class Config(NamedTuple):
    prologue: Rows
    forward: Tiles
    dq: Tiles
    dkv: Tiles


def config(head_dim: int, dtype: torch.dtype, num_heads: int) -> Config:
    """Tile sizes by registers, spills and shared memory (99 KiB on sm_86, 89 and 120); not yet by times."""
    prologue = Rows(16, 4)
    if dtype.itemsize > 2:  # fp32 has no tensor-core product that rounds like fp32: right, not fast
        small = Tiles(16, 16, 4, 1)
        return Config(prologue, small, small, small)
    arch = gpu_arch()
    # A program divides its number by that of the heads. By another than a power of two it keeps what comes of it, for
    # want of which registers the largest tiles spill.
    shifts = num_heads & (num_heads - 1) == 0
    if arch in (90, 100, 103):
        # The accelerator needs no register for an address, which leaves enough on Hopper for twice the keys a turn.
        passing = Tiles(128, 128 if arch == 90 else 64, 8, 2, tma=True)
        dq = passing if arch != 90 or shifts else Tiles(128, 64, 8, 3, tma=True)
        return Config(prologue, passing, dq, Tiles(64, 128, 8, 2))
    # Without wgmma both factors of a product pass through registers: these are the largest tiles that do not spill.
    forward = Tiles(128, 64, 8, 2) if shifts and arch != 120 else Tiles(128, 32, 8, 3)
    dkv = Tiles(64, 64, 8, 2) if shifts or arch != 80 else Tiles(32, 64, 8, 3)
    return Config(prologue, forward, Tiles(128, 32, 8, 2), dkv)


def prologue_candidates(head_dim: int, dtype: torch.dtype, num_heads: int) -> list[Tile]:
    return grid(lambda tile: tile["rows"] * head_dim // 2 >= 32 * tile["num_warps"], rows=(16, 32, 64),
                num_warps=(2, 4, 8))  # fmt: skip


# What these leave out spilled hundreds of bytes a thread, or took more than 227 KiB (bench/LOG.md, 2026-11-24).
def candidates(head_dim: int, dtype: torch.dtype, num_heads: int, seq_len: int, window: int) -> list[Tile]:
    """Of the two kernels whose queries stay while the keys pass."""
    if dtype.itemsize > 2:
        return []
    return grid(
        lambda tile: tile["block_m"] * min(tile["block_n"], 64) <= 1024 * tile["num_warps"]
        and tile["block_n"] * tile["num_stages"] < 512,
        block_m=(64, 128), block_n=(32, 64, 128), num_warps=(4, 8), num_stages=(2, 3, 4),
        tma=(True, False) if gpu_arch() >= 90 else (False,),
    )  # fmt: skip


def dkv_candidates(head_dim: int, dtype: torch.dtype, num_heads: int, seq_len: int, window: int) -> list[Tile]:
    if dtype.itemsize > 2:
        return []
    return [{**tile, "tma": False} for tile in grid(
        lambda tile: tile["block_m"] * tile["block_n"] <= 2048 or tile["num_warps"] == 8,
        block_m=(32, 64), block_n=(64, 128), num_warps=(4, 8), num_stages=(1, 2, 3, 4),
    )]  # fmt: skip


@triton.jit
def key_runs(m0, seq_len, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """For the queries [m0, m0 + BLOCK_M): where the keys' left edge, full tiles and diagonal begin, and their end.

    All tiles start at multiples of BLOCK_N. Query m sees the keys from m − window to m.
    """
    stop = min(m0 + BLOCK_M, seq_len)
    start = max(m0 - window, 0) // BLOCK_N * BLOCK_N
    full = (max(m0 + BLOCK_M - 1 - window, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N  # the last query sees it whole
    full = min(full, stop)
    diagonal = max(full, (m0 + 1) // BLOCK_N * BLOCK_N)  # the first query no longer does
    return start, full, diagonal, stop


@triton.jit
def query_runs(n0, seq_len, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """For the keys [n0, n0 + BLOCK_N): where the queries' diagonal, full tiles and far edge begin, and their end.

    All tiles start at multiples of BLOCK_M. Key n is seen by the queries from n to n + window.
    """
    stop = min(n0 + BLOCK_N + window, seq_len)
    start = n0 // BLOCK_M * BLOCK_M
    full = (n0 + BLOCK_N - 1 + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    full = min(full, stop)
    edge = max(full, min(n0 + window + 1, seq_len) // BLOCK_M * BLOCK_M)
    return start, full, edge, stop
