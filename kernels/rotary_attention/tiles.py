"""Which tiles of the score matrix a causal window touches, and how large the tiles are.

A row of tiles falls into three runs: tiles that an edge of the window cuts (masked), tiles wholly inside (no mask at
all), and tiles that the other edge cuts (masked). Tiles outside the window are in none of them. The two functions that
compute the runs are plain arithmetic: the tests run them as Python too, and hold them against the window itself.

A kernel walks them in three loops, or in one in which a branch asks each tile whether it is masked: a few instructions
a tile, where every loop has a pipeline to fill. Both sum the same numbers in the same order. Run RUN of RUNS goes from
edges[RUN] to edges[RUN + 4 - RUNS], of the four edges that the functions compute.
"""

from itertools import product
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
    tma: bool = False  # loads by the tensor memory accelerator
    runs: int = 3  # loops over a row of tiles, 3 or 1
    ahead: bool = False  # of dk and dv: log-sum-exp and delta come stages ahead, with queries and dout

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
    if arch == 90:
        # The accelerator needs no register for an address, and so there are three stages: with loads by pointers ptxas
        # would let no product begin before the last has ended. dK/dV has registers for them in one loop, not in three.
        forward, dq = Tiles(128, 128, 8, 3, tma=True), Tiles(128, 64, 8, 3, tma=True)
        return Config(prologue, forward, dq, Tiles(64, 128, 8, 3, tma=True, runs=1))
    if arch in (100, 103):
        passing = Tiles(128, 64, 8, 2, tma=True)
        return Config(prologue, passing, passing, Tiles(64, 128, 8, 2))
    # Without wgmma both factors of a product pass through registers: these are the largest tiles that do not spill. A
    # program divides its number by that of the heads. By another than a power of two it keeps what comes of it, for
    # want of which registers the largest tiles spill.
    shifts = num_heads & (num_heads - 1) == 0
    forward = Tiles(128, 64, 8, 2) if shifts and arch != 120 else Tiles(128, 32, 8, 3)
    dkv = Tiles(64, 64, 8, 2) if shifts or arch != 80 else Tiles(32, 64, 8, 3)
    return Config(prologue, forward, Tiles(128, 32, 8, 2), dkv)


def prologue_candidates(head_dim: int, dtype: torch.dtype, num_heads: int) -> list[Tile]:
    return grid(lambda tile: tile["rows"] * head_dim // 2 >= 32 * tile["num_warps"], rows=(16, 32, 64),
                num_warps=(2, 4, 8))  # fmt: skip


# Of what stays, 64 rows have the 4 warps of a warp group. What differs most from the default comes first: there may be
# no time for all of them.
def candidates(head_dim: int, dtype: torch.dtype, num_heads: int, seq_len: int, window: int) -> list[Tile]:
    """Of the two kernels whose queries stay while the keys pass."""
    if dtype.itemsize > 2:
        return []
    arch = gpu_arch()
    blocks_n = (128, 64) if arch in (90, 100, 103) else (64, 32)
    return [
        Tiles(queries, keys, queries // 16, stages, tma, runs)._asdict()
        for runs, stages, queries, keys, tma in product((1, 3), (3, 2, 4), (128, 64), blocks_n, loads(arch))
        if (queries + 2 * keys * stages) * head_dim * dtype.itemsize <= 227 * 1024
    ]


def dkv_candidates(head_dim: int, dtype: torch.dtype, num_heads: int, seq_len: int, window: int) -> list[Tile]:
    if dtype.itemsize > 2:
        return []
    arch = gpu_arch()
    hopper = [(64, 128, 8), (64, 64, 4), (32, 128, 8), (32, 64, 4)]
    others = [(64, 64, 8), (32, 64, 8), (32, 64, 4)]
    forms = [(tma, 1, ahead) for ahead in (False, True) for tma in loads(arch)] + [(False, 3, False)]
    return [
        Tiles(*size, stages, *form)._asdict()
        for form, stages, size in product(forms, (3, 2), hopper if arch in (90, 100, 103) else others)
        if form[1] == 1 or size[2] == 8  # three loops of four warps spill
    ]


def loads(arch: int) -> tuple[bool, ...]:
    """`tma` to try. Hopper's products wait for each other with loads by pointers, and before it there is no TMA."""
    return {90: (True,), 100: (True,), 103: (True,), 120: (True, False)}.get(arch, (False,))


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


@triton.jit
def hide_keys(
    scores, offs_m, offs_n, n0, full, diagonal, window,
    RUN: tl.constexpr, RUNS: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """The scores [BLOCK_M, BLOCK_N] of a tile in run RUN of RUNS, −inf where a query does not see the key. NARROW: both
    edges of the window may cut one tile."""
    left = n0 < full if RUNS == 1 else RUN == 0
    late = n0 >= diagonal if RUNS == 1 else RUN == 2
    if left:
        scores = tl.where(offs_n[None, :] >= (offs_m - n0 - window)[:, None], scores, float("-inf"))
        if NARROW:
            scores = tl.where(offs_n[None, :] <= (offs_m - n0)[:, None], scores, float("-inf"))
    if late:
        scores = tl.where(offs_n[None, :] <= (offs_m - n0)[:, None], scores, float("-inf"))
    return scores
