"""Polar Express: the nearest (semi-)orthogonal matrix to G, by five odd polynomials of growing accuracy.

    X ← G / (1.02·‖G‖_F + 1e-6), then five times X ← aX + (bA + cA²)X, A = XXᵀ

on the short side (XᵀX for a tall G). Every singular value of G goes to about 1 where it is not tiny. The iterates are
bf16 on purpose: the polynomials correct the rounding of the ones before. Coefficients: Amsel, Persson, Musco, Gower,
"The Polar Express", arXiv 2505.16932, for 5 steps and a lower bound of 1e-3, with a safety factor of 1.02.

G: [batch, rows, cols]; X the same, read through its transpose where G is tall, so nothing is copied. A and B = bA + cA²
are symmetric: only tiles on and below the diagonal are computed, and each is stored twice. Sums are fp32, each product
is rounded once. No backward.
FLOPs per matrix of short side m and long side n: 5·(m²n + m³ + 2m²n), the two symmetric products at half the price.
Bytes: G twice in fp32 and X once; then in each of the five steps four times X and five times m², in 16 bits.
"""

import torch
from torch import Tensor

from .choice import Choice, Tile, product_tiles
from .common import tl, triton, use_kernels

COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def polar_express_ref(g: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    tall = g.shape[-2] > g.shape[-1]
    norm = g.norm(dim=(-2, -1), keepdim=True)
    x = (g / (1.02 * norm + 1e-6)).to(dtype)
    if tall:
        x = x.mT
    for a, b, c in COEFFICIENTS:
        A = x @ x.mT
        # Fused, so that each sum is rounded once: bf16 is then 2% from fp64, and 5% unfused.
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        x = torch.baddbmm(x, B, x, beta=a)
    return x.mT if tall else x


@triton.jit
def _sum_of_squares_kernel(g_ptr, partial_ptr, size, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Σ g² of one stretch of one matrix of [batch, size]: partial[batch, stretch]."""
    base = tl.program_id(1).to(tl.int64) * size
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for step in range(STEPS):
        offs = (tl.program_id(0) * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        g = tl.load(g_ptr + base + offs, mask=offs < size, other=0.0)
        acc += g * g
    tl.store(partial_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), tl.sum(acc))


@triton.jit
def _scale_kernel(g_ptr, partial_ptr, x_ptr, size, parts, BLOCK_PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """x = g / (1.02·‖g‖ + 1e-6), ‖g‖² the sum of the matrix's partial sums."""
    base = tl.program_id(1).to(tl.int64) * size
    index = tl.arange(0, BLOCK_PARTS)
    norm = tl.sqrt_rn(tl.sum(tl.load(partial_ptr + tl.program_id(1) * parts + index, mask=index < parts, other=0.0)))
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(g_ptr + base + offs, mask=offs < size, other=0.0)
    tl.store(x_ptr + base + offs, tl.div_rn(g, 1.02 * norm + 1e-6).to(x_ptr.dtype.element_ty), mask=offs < size)


@triton.jit
def _symmetric_kernel(
    x_ptr, a_ptr, out_ptr, x_stride_b, x_stride_m, x_stride_k, M, K, alpha, beta,
    HAS_A: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = alpha·XXᵀ + beta·A for X [batch, M, K], A and out [batch, M, M]; tiles above the diagonal are mirrored."""
    tile_m = tl.program_id(0)
    tile_n = tl.program_id(1)
    if tile_n <= tile_m:
        batch = tl.program_id(2).to(tl.int64)
        offs_m = tile_m * BLOCK + tl.arange(0, BLOCK)
        offs_n = tile_n * BLOCK + tl.arange(0, BLOCK)
        offs_k = tl.arange(0, BLOCK_K)
        row_ptrs = x_ptr + batch * x_stride_b + offs_m[:, None] * x_stride_m + offs_k[None, :] * x_stride_k
        col_ptrs = x_ptr + batch * x_stride_b + offs_n[None, :] * x_stride_m + offs_k[:, None] * x_stride_k
        acc = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
        for k in range(0, K, BLOCK_K):
            rows = tl.load(row_ptrs, mask=(offs_m[:, None] < M) & (offs_k[None, :] < K - k), other=0.0)
            cols = tl.load(col_ptrs, mask=(offs_n[None, :] < M) & (offs_k[:, None] < K - k), other=0.0)
            acc = tl.dot(rows, cols, acc, input_precision="ieee")
            row_ptrs += BLOCK_K * x_stride_k
            col_ptrs += BLOCK_K * x_stride_k
        acc = alpha * acc
        offs = batch * M * M + offs_m[:, None] * M + offs_n[None, :]
        mask = (offs_m[:, None] < M) & (offs_n[None, :] < M)
        if HAS_A:
            acc += beta * tl.load(a_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        value = acc.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + offs, value, mask=mask)
        if tile_n < tile_m:
            mirror = batch * M * M + offs_n[:, None] * M + offs_m[None, :]
            tl.store(out_ptr + mirror, tl.trans(value), mask=(offs_n[:, None] < M) & (offs_m[None, :] < M))


@triton.jit
def _apply_kernel(
    b_ptr, x_ptr, out_ptr, stride_b, stride_m, stride_n, M, N, alpha,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = alpha·X + B·X for B [batch, M, M], X and out [batch, M, N] with the same strides."""
    batch = tl.program_id(2).to(tl.int64)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    b_ptrs = b_ptr + batch * M * M + offs_m[:, None] * M + offs_k[None, :]
    x_ptrs = x_ptr + batch * stride_b + offs_k[:, None] * stride_m + offs_n[None, :] * stride_n
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k in range(0, M, BLOCK_K):
        b = tl.load(b_ptrs, mask=(offs_m[:, None] < M) & (offs_k[None, :] < M - k), other=0.0)
        x = tl.load(x_ptrs, mask=(offs_k[:, None] < M - k) & (offs_n[None, :] < N), other=0.0)
        acc = tl.dot(b, x, acc, input_precision="ieee")
        b_ptrs += BLOCK_K
        x_ptrs += BLOCK_K * stride_m
    offs = batch * stride_b + offs_m[:, None] * stride_m + offs_n[None, :] * stride_n
    mask = (offs_m[:, None] < M) & (offs_n[None, :] < N)
    acc += alpha * tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=mask)


BLOCK, STEPS = 2048, 8  # elements of a program that scales; steps of one that sums squares


def _config(M: int, N: int) -> tuple[Tile, Tile]:
    """Tiles of the symmetric products and of the last one, for a short side M and a long side N.

    A batch here is 8 to 24 matrices of at most 512 on the short side: tiles of 64 make enough programs to fill a GPU
    and are the least that wgmma takes; the tile matters little in all of a step. Not yet measured.
    """
    # Rows that are no whole vectors need an address for each element, and more threads to hold them.
    whole = M % 16 == N % 16 == 0
    block = 128 if M > 512 and whole else 64
    common = {"BLOCK_K": 64, "num_stages": 3}
    symmetric = {"BLOCK": block, "num_warps": 4 if block == 64 and whole else 8, **common}
    block_n = 128 if N >= 128 and whole else 64
    return symmetric, {"BLOCK_M": 64, "BLOCK_N": block_n, "num_warps": 4 if whole else 8, **common}


def _symmetric_candidates(M: int, N: int, dtype: torch.dtype) -> list[Tile]:
    if dtype.itemsize > 2 or M % 16 or N % 16:
        return []
    return product_tiles(((32, 4), (64, 2), (64, 3), (64, 4), (128, 2)), BLOCK=(64, 128))


def _last_candidates(M: int, N: int, dtype: torch.dtype) -> list[Tile]:
    if dtype.itemsize > 2 or M % 16 or N % 16:
        return []
    return product_tiles(((64, 3), (64, 4), (128, 2)), BLOCK_M=(64, 128), BLOCK_N=(64, 128, 256))


# (short side, long side, dtype of the iterates). How many matrices there are is no part of it: a process that holds a
# share of them takes the tile that all would have, and computes the same bits.
SYMMETRIC = Choice("polar-symmetric", [_symmetric_kernel], lambda M, N, dtype: _config(M, N)[0], _symmetric_candidates)
LAST = Choice("polar-last", [_apply_kernel], lambda M, N, dtype: _config(M, N)[1], _last_candidates)


def _launch(g: Tensor, dtype: torch.dtype) -> Tensor:
    if g.ndim != 3 or g.dtype != torch.float32 or not g.is_contiguous():
        raise ValueError(f"g: {tuple(g.shape)} {g.dtype}, the kernels need [batch, rows, cols], contiguous float32")
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype: {dtype}, the kernels take float32, float16 and bfloat16")
    batch, rows, cols = g.shape
    size = rows * cols
    parts = triton.cdiv(size, BLOCK * STEPS)
    partial = torch.empty(batch, parts, dtype=torch.float32, device=g.device)
    _sum_of_squares_kernel[(parts, batch)](g, partial, size, BLOCK=BLOCK, STEPS=STEPS, num_warps=4)
    x, other = torch.empty_like(g, dtype=dtype), torch.empty_like(g, dtype=dtype)
    _scale_kernel[(triton.cdiv(size, BLOCK), batch)](
        g, partial, x, size, parts, BLOCK_PARTS=triton.next_power_of_2(parts), BLOCK=BLOCK, num_warps=4
    )
    # The short side first: a tall matrix is read and written through its transpose.
    M, N = min(rows, cols), max(rows, cols)
    strides = (size, cols, 1) if rows <= cols else (size, 1, cols)
    A, B = (torch.empty(batch, M, M, dtype=dtype, device=g.device) for _ in range(2))
    symmetric, last = SYMMETRIC(M, N, dtype), LAST(M, N, dtype)
    tiles = triton.cdiv(M, symmetric["BLOCK"])
    for a, b, c in COEFFICIENTS:
        _symmetric_kernel[(tiles, tiles, batch)](x, None, A, *strides, M, N, 1.0, 0.0, HAS_A=False, **symmetric)
        _symmetric_kernel[(tiles, tiles, batch)](A, A, B, M * M, M, 1, M, M, c, b, HAS_A=True, **symmetric)
        grid = (triton.cdiv(M, last["BLOCK_M"]), triton.cdiv(N, last["BLOCK_N"]), batch)
        _apply_kernel[grid](B, x, other, *strides, M, N, a, **last)
        x, other = other, x
    return x


def polar_express(g: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The orthogonal factor of each matrix of a batch.

    Args:
        g: [batch, rows, cols], fp32 or fp64; zero matrices stay zero. The kernels take contiguous fp32.
        dtype: of the iterates.

    Returns:
        the same shape, in `dtype`.

    Raises:
        ValueError: a shape, dtype or stride that the kernels do not take.
    """
    return _launch(g, dtype) if use_kernels(g) else polar_express_ref(g, dtype)


def cost(batch: int, rows: int, cols: int, itemsize: int = 2) -> tuple[int, int]:
    """Bytes that have to move and FLOPs, where the symmetric products are made by half."""
    M, N = min(rows, cols), max(rows, cols)
    size = M * N
    step_bytes = itemsize * (4 * size + 5 * M * M)  # X read three times, written once; A written and read twice; B
    steps = len(COEFFICIENTS)
    flops = 4 * size + steps * (M * M * N + M**3 + 2 * M * M * N)
    return batch * (2 * 4 * size + itemsize * size + steps * step_bytes), batch * flops
