"""Flash attention over a causal window, forward (Dao et al., arXiv 2205.14135).

No running maximum in fp32 and bf16: normed heads have |q·k|/√head_dim ≤ √head_dim, so exp(score) stays between
e^−11.4 and e^11.4, which both dtypes hold at full precision. Hence no tile rescales the ones before it. fp16 does not
reach that far, and keeps one; it starts at the least score there can be, so that infinity is never taken from infinity.
"""

import torch
from torch import Tensor

from ..common import tl, triton
from . import tiles
from .prologue import query_scale
from .tiles import key_runs


@triton.jit
def _fwd_run(
    acc, total, divisor, peak, q, k_ptr, v_ptr, start, stop, m0, seq_len, window,
    RUNNING_MAX: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Adds the keys of one run of tiles: to the output times `divisor`, the sum of its weights; to `total`, the sum of
    the weights before they were rounded; and to the peak."""
    offs_m = m0 + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, HEAD_DIM)
    k_offs = offs_n[:, None] * K_STRIDE + offs_d[None, :]
    v_offs = offs_n[:, None] * V_STRIDE + offs_d[None, :]
    k_stride, v_stride = tl.full((), K_STRIDE, tl.int64), tl.full((), V_STRIDE, tl.int64)
    for n0 in tl.range(start, stop, BLOCK_N, num_stages=None if CAUSAL or WINDOWED else STAGES):
        if CAUSAL or WINDOWED:
            live = (n0 + offs_n < seq_len)[:, None]
            k = tl.load(k_ptr + n0 * k_stride + k_offs, mask=live, other=0.0)
            v = tl.load(v_ptr + n0 * v_stride + v_offs, mask=live, other=0.0)
        else:
            k = tl.load(k_ptr + n0 * k_stride + k_offs)
            v = tl.load(v_ptr + n0 * v_stride + v_offs)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N], exponents of 2
        if CAUSAL:
            scores = tl.where(offs_n[None, :] <= (offs_m - n0)[:, None], scores, float("-inf"))
        if WINDOWED:
            scores = tl.where(offs_n[None, :] >= (offs_m - n0 - window)[:, None], scores, float("-inf"))
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
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    seq_len, window, q_stride_b, v_stride_b, least,
    RUNNING_MAX: tl.constexpr, Q_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, NARROW: tl.constexpr,
    STAGES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head. Neighbours share a head, the longest rows first."""
    blocks = tl.cdiv(seq_len, BLOCK_M)
    m0 = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    row = tl.program_id(0) // blocks  # batch · NUM_HEADS + head
    batch, head = (row // NUM_HEADS).to(tl.int64), row % NUM_HEADS
    q_ptr += batch * q_stride_b + head * HEAD_DIM
    k_ptr += batch * q_stride_b + head // GROUP * HEAD_DIM
    v_ptr += batch * v_stride_b + head // GROUP * HEAD_DIM

    offs_m = m0 + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, HEAD_DIM)
    live = offs_m < seq_len
    q = tl.load(q_ptr + offs_m.to(tl.int64)[:, None] * Q_STRIDE + offs_d[None, :], mask=live[:, None], other=0.0)
    acc = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    divisor = tl.zeros((BLOCK_M,), tl.float32)
    peak = tl.full((BLOCK_M,), least if RUNNING_MAX else 0.0, tl.float32)
    start, full, diagonal, stop = key_runs(m0, seq_len, window, BLOCK_M, BLOCK_N)
    acc, total, divisor, peak = _fwd_run(
        acc, total, divisor, peak, q, k_ptr, v_ptr, start, full, m0, seq_len, window,
        RUNNING_MAX=RUNNING_MAX, K_STRIDE=Q_STRIDE, V_STRIDE=V_STRIDE,
        CAUSAL=NARROW, WINDOWED=True, STAGES=STAGES, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, HEAD_DIM=HEAD_DIM,
    )  # fmt: skip
    acc, total, divisor, peak = _fwd_run(
        acc, total, divisor, peak, q, k_ptr, v_ptr, full, diagonal, m0, seq_len, window,
        RUNNING_MAX=RUNNING_MAX, K_STRIDE=Q_STRIDE, V_STRIDE=V_STRIDE,
        CAUSAL=False, WINDOWED=False, STAGES=STAGES, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, HEAD_DIM=HEAD_DIM,
    )  # fmt: skip
    acc, total, divisor, peak = _fwd_run(
        acc, total, divisor, peak, q, k_ptr, v_ptr, diagonal, stop, m0, seq_len, window,
        RUNNING_MAX=RUNNING_MAX, K_STRIDE=Q_STRIDE, V_STRIDE=V_STRIDE,
        CAUSAL=True, WINDOWED=False, STAGES=STAGES, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, HEAD_DIM=HEAD_DIM,
    )  # fmt: skip

    # Rows past the end may have seen no key.
    total, divisor = tl.where(live, total, 1.0), tl.where(live, divisor, 1.0)
    out_ptr += (batch * seq_len * NUM_HEADS + head) * HEAD_DIM
    out_offs = offs_m.to(tl.int64)[:, None] * (NUM_HEADS * HEAD_DIM) + offs_d[None, :]
    tl.store(out_ptr + out_offs, acc / divisor[:, None], mask=live[:, None])
    tl.store(lse_ptr + row.to(tl.int64) * seq_len + offs_m, tl.log2(total) + peak, mask=live)


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, head_dim: int, window: int) -> tuple[Tensor, Tensor]:
    """(out [B, T, H·head_dim], lse [B, H, T]: log₂ Σ exp(score), fp32).

    q: [B, T, H·head_dim], as the prologue scales it; k, v: [B, T, KVH·head_dim]. q and k are slices of one tensor, so
    that they share strides.
    """
    B, T, width = q.shape
    num_heads, group, window = width // head_dim, width // k.shape[-1], min(window, T)
    out = torch.empty(B, T, width, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, num_heads, T, dtype=torch.float32, device=q.device)
    block = tiles.config(head_dim, q.dtype).forward
    least = -1.01 * head_dim * query_scale(head_dim)  # q and k are rounded: 1 % below what their norms allow
    _attention_fwd_kernel[(triton.cdiv(T, block.block_m) * B * num_heads,)](
        q, k, v, out, lse,
        T, window, q.stride(0), v.stride(0), least,
        RUNNING_MAX=q.dtype == torch.float16, Q_STRIDE=q.stride(1), V_STRIDE=v.stride(1),
        NUM_HEADS=num_heads, GROUP=group, HEAD_DIM=head_dim, NARROW=block.both_edges(window), STAGES=block.full_stages,
        BLOCK_M=block.block_m, BLOCK_N=block.block_n, num_warps=block.num_warps, num_stages=block.num_stages,
    )  # fmt: skip
    return out, lse
