"""Rotary, QK-norm and the gated value embedding, once per token, and the first two backwards.

In place: the normed queries and keys and, on layers with a value embedding, the mixed values take the place of what was
projected. Other layers' values stay as they are, so that one tensor holds all that attention reads and no part of it is
kept twice. Queries are also multiplied by log₂(e)/√head_dim, so that their product with a key is the exponent of 2 of
its weight: no kernel scales a score. Saved: what each head was multiplied by, times ln 2, in fp32, [B, T, H + KVH]: the
gradient of an exponent of 2 is ln 2 of that of a score, and so the backward's last factor is one number a head.
"""

import math

import torch
from torch import Tensor

from ..choice import Choice
from ..common import EPS, tl, triton
from . import tiles


def query_scale(head_dim: int) -> float:
    """What the prologue multiplies normed queries by."""
    return math.log2(math.e) / math.sqrt(head_dim)


@triton.jit
def _prologue_kernel(
    qkv_ptr, cos_ptr, sin_ptr, ve_ptr, gate_ptr, factor_ptr,
    tokens, seq_len, qkv_stride_b, qkv_stride_t, ve_stride_b, ve_stride_t, gate_stride_b, gate_stride_t,
    query_scale, eps, NUM_HEADS: tl.constexpr, NORM_HEADS: tl.constexpr, VE_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = HEAD_DIM // 2
    LN_2: tl.constexpr = 0.6931471805599453
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = token < tokens
    batch, t = token // seq_len, token % seq_len
    mask = live[:, None]

    offs = tl.arange(0, HALF)[None, :]
    table = t[:, None] * HALF + offs
    cos = tl.load(cos_ptr + table, mask=mask, other=0.0)  # [BLOCK_T, HALF]
    sin = tl.load(sin_ptr + table, mask=mask, other=0.0)
    rows = qkv_ptr + (batch * qkv_stride_b + t * qkv_stride_t)[:, None]
    for head in range(NORM_HEADS):
        left, right = rows + head * HEAD_DIM + offs, rows + head * HEAD_DIM + HALF + offs
        x1 = tl.load(left, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(right, mask=mask, other=0.0).to(tl.float32)
        y1 = x1 * cos + x2 * sin
        y2 = x2 * cos - x1 * sin
        rstd = tl.rsqrt(tl.sum(y1 * y1 + y2 * y2, axis=1) / HEAD_DIM + eps)
        factor = rstd * tl.where(head < NUM_HEADS, query_scale, 1.0)
        tl.store(left, y1 * factor[:, None], mask=mask)
        tl.store(right, y2 * factor[:, None], mask=mask)
        tl.store(factor_ptr + token * NORM_HEADS + head, LN_2 * factor, mask=live)

    if VE_HEADS > 0:
        offs_d = tl.arange(0, HEAD_DIM)[None, :]
        gates = gate_ptr + batch * gate_stride_b + t * gate_stride_t
        values = rows + NORM_HEADS * HEAD_DIM + offs_d
        embeddings = ve_ptr + (batch * ve_stride_b + t * ve_stride_t)[:, None] + offs_d
        for head in range(VE_HEADS):
            weight = 2 * tl.sigmoid(tl.load(gates + head, mask=live, other=0.0).to(tl.float32))
            v = tl.load(values + head * HEAD_DIM, mask=mask, other=0.0).to(tl.float32)
            ve = tl.load(embeddings + head * HEAD_DIM, mask=mask, other=0.0).to(tl.float32)
            tl.store(values + head * HEAD_DIM, v + weight[:, None] * ve, mask=mask)


@triton.jit
def _halves(x, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """[ROWS, HEAD_DIM] → its left and right halves."""
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, HEAD_DIM // 2)), (0, 2, 1)))


@triton.jit
def rotary_norm_bwd(
    dy, y_ptr, factor, cos_ptr, sin_ptr, dx_ptr, live,
    SQUARE: tl.constexpr, Y_STRIDE: tl.constexpr, DX_STRIDE: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Takes dy, the fp32 gradient of a tile of normed heads, through norm and rotary, and stores it at `dx_ptr`.

    With u the rotated head and y = factor·u, a constant over its size:  du = factor·(dy − y·⟨dy, y⟩/⟨y, y⟩); then the
    rotation, transposed. SQUARE is ⟨y, y⟩: head_dim for a key, log₂(e)² for a query as the prologue scales it.
    All pointers are those of the tile's first row; the tables are contiguous.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    rows = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, HALF)[None, :]
    mask = live[:, None]
    dy1, dy2 = _halves(dy, ROWS, HEAD_DIM)
    y1 = tl.load(y_ptr + rows * Y_STRIDE + cols, mask=mask, other=0.0).to(tl.float32)
    y2 = tl.load(y_ptr + rows * Y_STRIDE + HALF + cols, mask=mask, other=0.0).to(tl.float32)
    along = tl.sum(dy1 * y1 + dy2 * y2, axis=1)[:, None] / SQUARE
    du1 = factor[:, None] * (dy1 - y1 * along)
    du2 = factor[:, None] * (dy2 - y2 * along)
    cos = tl.load(cos_ptr + rows * HALF + cols, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + rows * HALF + cols, mask=mask, other=0.0)
    tl.store(dx_ptr + rows * DX_STRIDE + cols, du1 * cos - du2 * sin, mask=mask)
    tl.store(dx_ptr + rows * DX_STRIDE + HALF + cols, du1 * sin + du2 * cos, mask=mask)


PROLOGUE = Choice(
    "attention-prologue", [_prologue_kernel],
    lambda head_dim, dtype, heads: tiles.config(head_dim, dtype, heads).prologue._asdict(), tiles.prologue_candidates,
)  # fmt: skip


def prologue_fwd_(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int, ve: Tensor | None, gate: Tensor | None
) -> Tensor:
    """The factors, [B, T, H + KVH]; qkv is overwritten as described above. `cos` and `sin` contiguous, all else checked
    by the caller."""
    B, T, _ = qkv.shape
    head_dim = 2 * cos.shape[-1]
    norm_heads, ve_heads = num_heads + num_kv_heads, 0 if ve is None else num_kv_heads
    factors = torch.empty(B, T, norm_heads, dtype=torch.float32, device=qkv.device)
    block = tiles.Rows(**PROLOGUE(head_dim, qkv.dtype, num_heads))
    _prologue_kernel[(triton.cdiv(B * T, block.rows),)](
        qkv, cos, sin, ve, gate, factors,
        B * T, T, qkv.stride(0), qkv.stride(1),
        0 if ve is None else ve.stride(0), 0 if ve is None else ve.stride(1),
        0 if ve is None else gate.stride(0), 0 if ve is None else gate.stride(1), query_scale(head_dim), EPS,
        NUM_HEADS=num_heads, NORM_HEADS=norm_heads, VE_HEADS=ve_heads, HEAD_DIM=head_dim,
        BLOCK_T=block.rows, num_warps=block.num_warps,
    )  # fmt: skip
    torch.autograd.graph.increment_version(qkv)
    return factors
