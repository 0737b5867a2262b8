"""Flash attention over a causal window, forward (Dao et al., arXiv 2205.14135).

No running maximum in fp32 and bf16: normed heads have |q·k|/√head_dim ≤ √head_dim, so exp(score) stays between
e^−11.4 and e^11.4, which both dtypes hold at full precision. Hence no tile rescales the ones before it. fp16 does not
reach that far, and keeps one; it starts at the least score there can be, so that infinity is never taken from infinity.
"""

import torch
from torch import Tensor

from ..choice import Choice
from ..common import tl, triton
from . import tiles
from .prologue import query_scale
from .rows import fits_tma, load_rows, row_source
from .tiles import hide_keys, key_runs


@triton.jit
def _fwd_run(
    acc, total, divisor, peak, q, k_source, v_source, batch, head, edges, m0, seq_len, window,
    k_stride_b, v_stride_b, RUNNING_MAX: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr,
    TMA: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr, NARROW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Adds the keys of one run of tiles: to the output times `divisor`, the sum of its weights; to `total`, the sum of
    the weights before they were rounded; and to the peak."""
    offs_m = m0 + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    for n0 in range(edges[RUN], edges[RUN + 4 - RUNS], BLOCK_N):
        k = load_rows(
            k_source, batch, n0, head, seq_len, k_stride_b,
            STRIDE=K_STRIDE, MASKED=RUN != 1, TMA=TMA, ROWS=BLOCK_N, HEAD_DIM=HEAD_DIM,
        )  # fmt: skip
        v = load_rows(
            v_source, batch, n0, head, seq_len, v_stride_b,
            STRIDE=V_STRIDE, MASKED=RUN != 1, TMA=TMA, ROWS=BLOCK_N, HEAD_DIM=HEAD_DIM,
        )  # fmt: skip
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N], exponents of 2
        scores = hide_keys(
            scores, offs_m, offs_n, n0, edges[1], edges[2], window, RUN=RUN, RUNS=RUNS, NARROW=NARROW,
        )  # fmt: skip
        if RUNNING_MAX:
            higher = tl.maximum(peak, tl.max(scores, axis=1))
            total *= tl.exp2(peak - higher)
            divisor *= tl.exp2(peak - higher)
            acc *= tl.exp2(peak - higher)[:, None]
            scores -= higher[:, None]
            peak = higher
        p = tl.exp2(scores)
        total += tl.sum(p, axis=1)
        # What is multiplied has 16 bits, and is divided by its own sum: where one key is all there is, out is its very
        # value. To bf16 by cutting bits off: what that makes too small on average, the division makes good, and a
        # conversion with two uses would be made number by number, in the slow pipe that exp2 needs too.
        if v.dtype == tl.bfloat16:
            p = (p.to(tl.int32, bitcast=True) & -0x10000).to(tl.float32, bitcast=True)
        else:
            p = p.to(v.dtype).to(tl.float32)
        divisor += tl.sum(p, axis=1)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return acc, total, divisor, peak


@triton.jit
def _attention_fwd_kernel(
    q_source, k_source, v_source, out_ptr, neg_lse_ptr,
    seq_len, window, q_stride_b, v_stride_b, least,
    RUNNING_MAX: tl.constexpr, Q_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, NARROW: tl.constexpr,
    TMA: tl.constexpr, RUNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head. Neighbours share a head, the longest rows first."""
    blocks = tl.cdiv(seq_len, BLOCK_M)
    m0 = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    row = tl.program_id(0) // blocks  # batch · NUM_HEADS + head
    batch, head = row // NUM_HEADS, row % NUM_HEADS

    offs_m = m0 + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, HEAD_DIM)
    live = offs_m < seq_len
    q = load_rows(
        q_source, batch, m0, head, seq_len, q_stride_b,
        STRIDE=Q_STRIDE, MASKED=True, TMA=TMA, ROWS=BLOCK_M, HEAD_DIM=HEAD_DIM,
    )  # fmt: skip
    acc = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    divisor = tl.zeros((BLOCK_M,), tl.float32)
    peak = tl.full((BLOCK_M,), least if RUNNING_MAX else 0.0, tl.float32)
    edges = key_runs(m0, seq_len, window, BLOCK_M, BLOCK_N)
    for run in tl.static_range(RUNS):
        acc, total, divisor, peak = _fwd_run(
            acc, total, divisor, peak, q, k_source, v_source, batch, head // GROUP, edges, m0, seq_len, window,
            q_stride_b, v_stride_b, RUNNING_MAX=RUNNING_MAX, K_STRIDE=Q_STRIDE, V_STRIDE=V_STRIDE, TMA=TMA,
            RUN=run, RUNS=RUNS, NARROW=NARROW, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, HEAD_DIM=HEAD_DIM,
        )  # fmt: skip

    # Rows past the end may have seen no key.
    total, divisor = tl.where(live, total, 1.0), tl.where(live, divisor, 1.0)
    out_ptr += (batch.to(tl.int64) * seq_len * NUM_HEADS + head) * HEAD_DIM
    out_offs = offs_m.to(tl.int64)[:, None] * (NUM_HEADS * HEAD_DIM) + offs_d[None, :]
    tl.store(out_ptr + out_offs, acc / divisor[:, None], mask=live[:, None])
    tl.store(neg_lse_ptr + row.to(tl.int64) * seq_len + offs_m, -tl.log2(total) - peak, mask=live)


# Of a head: (head_dim, dtype, heads, tokens of a row, window).
FORWARD = Choice(
    "attention-forward", [_attention_fwd_kernel],
    lambda head_dim, dtype, heads, *row: tiles.config(head_dim, dtype, heads).forward._asdict(), tiles.candidates,
)  # fmt: skip


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, head_dim: int, window: int) -> tuple[Tensor, Tensor]:
    """(out [B, T, H·head_dim], neg_lse [B, H, T]: −log₂ Σ exp(score), fp32).

    q: [B, T, H·head_dim], as the prologue scales it; k, v: [B, T, KVH·head_dim]. q and k are slices of one tensor, so
    that they share strides.
    """
    B, T, width = q.shape
    num_heads, group, window = width // head_dim, width // k.shape[-1], min(window, T)
    out = torch.empty(B, T, width, dtype=q.dtype, device=q.device)
    neg_lse = torch.empty(B, num_heads, T, dtype=torch.float32, device=q.device)
    block = tiles.Tiles(**FORWARD(head_dim, q.dtype, num_heads, T, window))
    tma = block.tma and fits_tma(q, k, v)
    least = -1.01 * head_dim * query_scale(head_dim)  # q and k are rounded: 1 % below what their norms allow
    _attention_fwd_kernel[(triton.cdiv(T, block.block_m) * B * num_heads,)](
        row_source(q, block.block_m, head_dim, tma), row_source(k, block.block_n, head_dim, tma),
        row_source(v, block.block_n, head_dim, tma), out, neg_lse,
        T, window, q.stride(0), v.stride(0), least,
        RUNNING_MAX=q.dtype == torch.float16, Q_STRIDE=q.stride(1), V_STRIDE=v.stride(1),
        NUM_HEADS=num_heads, GROUP=group, HEAD_DIM=head_dim, NARROW=block.both_edges(window), TMA=tma, RUNS=block.runs,
        BLOCK_M=block.block_m, BLOCK_N=block.block_n, num_warps=block.num_warps, num_stages=block.num_stages,
    )  # fmt: skip
    return out, neg_lse
