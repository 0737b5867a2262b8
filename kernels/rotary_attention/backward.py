"""Attention backward, through QK-norm, rotary and value embedding to the gradient of qkv. No atomics: same bits twice.

With p = exp2(q·kᵀ − lse), q scaled as the prologue leaves it, recomputed tile by tile:

    delta = rowsum(dout·out)    dv = pᵀ·dout    ds = p·(dout·vᵀ − delta)    dq = ln 2·ds·k    dk = ln 2·dsᵀ·q

Both lse and delta are stored negated, as the products' accumulators start with them.

Two kernels: the first walks the keys of each block of queries (dq; it also writes −delta), the second the queries of
each block of keys (dk, dv, summed over the group's heads). Each ends by taking its tile back through what the prologue
did, while it is in registers: no gradient of a normed head is ever stored. Both compute p and ds, 7 products for 5.
"""

import torch
from torch import Tensor

from ..choice import Choice
from ..common import tl, triton
from . import tiles
from .prologue import rotary_norm_bwd
from .rows import fits_tma, load_rows, row_source
from .tiles import hide_keys, key_runs, query_runs


@triton.jit
def _dq_run(
    dq, q, do, neg_lse, neg_delta, k_source, v_source, batch, head, edges, m0, seq_len, window,
    k_stride_b, v_stride_b, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, TMA: tl.constexpr,
    RUN: tl.constexpr, RUNS: tl.constexpr, NARROW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Adds the keys of one run of tiles to dq (without the factor ln 2)."""
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
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") + neg_lse[:, None]  # [BLOCK_M, BLOCK_N]
        scores = hide_keys(
            scores, offs_m, offs_n, n0, edges[1], edges[2], window, RUN=RUN, RUNS=RUNS, NARROW=NARROW,
        )  # fmt: skip
        p = tl.exp2(scores)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        ds = p * (dp + neg_delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit
def _attention_dq_kernel(
    q_source, k_source, v_source, do_source, q_ptr, out_ptr, neg_lse_ptr, neg_delta_ptr, factor_ptr, cos_ptr, sin_ptr,
    grad_scale_ptr, dq_ptr, seq_len, window, q_stride_b, v_stride_b,
    Q_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_GRAD_SCALE: tl.constexpr,
    NARROW: tl.constexpr, TMA: tl.constexpr, RUNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head, the longest rows first."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    KV_HEADS: tl.constexpr = NUM_HEADS // GROUP
    NORM_HEADS: tl.constexpr = NUM_HEADS + KV_HEADS
    OUT_STRIDE: tl.constexpr = NUM_HEADS * HEAD_DIM
    DQKV_STRIDE: tl.constexpr = (NUM_HEADS + 2 * KV_HEADS) * HEAD_DIM
    blocks = tl.cdiv(seq_len, BLOCK_M)
    m0 = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    row = tl.program_id(0) // blocks
    batch, head = row // NUM_HEADS, row % NUM_HEADS
    first = batch.to(tl.int64) * seq_len + m0  # the tile's first token
    out_ptr += (first * NUM_HEADS + head) * HEAD_DIM
    neg_lse_ptr += row.to(tl.int64) * seq_len + m0
    neg_delta_ptr += row.to(tl.int64) * seq_len + m0

    rows = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, HEAD_DIM)[None, :]
    live = m0 + rows < seq_len
    q = load_rows(
        q_source, batch, m0, head, seq_len, q_stride_b,
        STRIDE=Q_STRIDE, MASKED=True, TMA=TMA, ROWS=BLOCK_M, HEAD_DIM=HEAD_DIM,
    )  # fmt: skip
    out_stride_b = tl.full((), OUT_STRIDE, tl.int64) * seq_len
    do = load_rows(
        do_source, batch, m0, head, seq_len, out_stride_b,
        STRIDE=OUT_STRIDE, MASKED=True, TMA=TMA, ROWS=BLOCK_M, HEAD_DIM=HEAD_DIM,
    )  # fmt: skip
    out = tl.load(out_ptr + rows[:, None] * OUT_STRIDE + offs_d, mask=live[:, None], other=0.0)
    neg_delta = -tl.sum(do.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(neg_delta_ptr + rows, neg_delta, mask=live)
    neg_lse = tl.load(neg_lse_ptr + rows, mask=live, other=0.0)

    dq = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    edges = key_runs(m0, seq_len, window, BLOCK_M, BLOCK_N)
    for run in tl.static_range(RUNS):
        dq = _dq_run(
            dq, q, do, neg_lse, neg_delta, k_source, v_source, batch, head // GROUP, edges, m0, seq_len, window,
            q_stride_b, v_stride_b, K_STRIDE=Q_STRIDE, V_STRIDE=V_STRIDE, TMA=TMA,
            RUN=run, RUNS=RUNS, NARROW=NARROW, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, HEAD_DIM=HEAD_DIM,
        )  # fmt: skip

    factor_ptr += first * NORM_HEADS + head
    factor = tl.load(factor_ptr + rows * NORM_HEADS, mask=live, other=0.0)
    if HAS_GRAD_SCALE:
        factor *= tl.load(grad_scale_ptr + first + rows, mask=live, other=0.0)
    table = m0.to(tl.int64) * (HEAD_DIM // 2)
    q_ptr += batch.to(tl.int64) * q_stride_b + m0.to(tl.int64) * Q_STRIDE + head * HEAD_DIM
    rotary_norm_bwd(
        dq, q_ptr, factor, cos_ptr + table, sin_ptr + table,
        dq_ptr + first * DQKV_STRIDE + head * HEAD_DIM, live,
        SQUARE=LOG2_E * LOG2_E, Y_STRIDE=Q_STRIDE, DX_STRIDE=DQKV_STRIDE, ROWS=BLOCK_M, HEAD_DIM=HEAD_DIM,
    )  # fmt: skip


@triton.jit
def _dkv_run(
    dk, dv, k, v, q_source, do_source, neg_lse_ptr, neg_delta_ptr, batch, head, edges, n0, seq_len, window,
    q_stride_b, do_stride_b, Q_STRIDE: tl.constexpr, DO_STRIDE: tl.constexpr, TMA: tl.constexpr,
    RUN: tl.constexpr, RUNS: tl.constexpr, AHEAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Adds the queries of one run of tiles to dk (without the factor ln 2) and dv."""
    MASKED: tl.constexpr = RUN != 1  # in one loop all are
    offs_n = n0 + tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, HEAD_DIM)
    if not TMA:
        q_offs = offs_m[:, None] * Q_STRIDE + offs_d[None, :]
        do_offs = offs_m[:, None] * DO_STRIDE + offs_d[None, :]
        q_stride, do_stride = tl.full((), Q_STRIDE, tl.int64), tl.full((), DO_STRIDE, tl.int64)
        q_ptr = q_source + batch * q_stride_b + head * HEAD_DIM + edges[RUN] * q_stride
        do_ptr = do_source + batch * do_stride_b + head * HEAD_DIM + edges[RUN] * do_stride
    for m0 in tl.range(edges[RUN], edges[RUN + 4 - RUNS], BLOCK_M, num_stages=AHEAD):
        # They come straight into registers, and the first product waits for them. ptxas asks for them before it waits
        # for q and do where descriptors copy these, and after it where pointers do. With AHEAD, the stages of this very
        # loop, Triton has them copied as q and do are.
        if MASKED:
            live = m0 + offs_m < seq_len
            neg_lse = tl.load(neg_lse_ptr + m0 + offs_m, mask=live, other=0.0)
            neg_delta = tl.load(neg_delta_ptr + m0 + offs_m, mask=live, other=0.0)
        else:
            neg_lse = tl.load(neg_lse_ptr + m0 + offs_m)
            neg_delta = tl.load(neg_delta_ptr + m0 + offs_m)
        if TMA:
            q = load_rows(
                q_source, batch, m0, head, seq_len, q_stride_b,
                STRIDE=Q_STRIDE, MASKED=MASKED, TMA=TMA, ROWS=BLOCK_M, HEAD_DIM=HEAD_DIM,
            )  # fmt: skip
            do = load_rows(
                do_source, batch, m0, head, seq_len, do_stride_b,
                STRIDE=DO_STRIDE, MASKED=MASKED, TMA=TMA, ROWS=BLOCK_M, HEAD_DIM=HEAD_DIM,
            )  # fmt: skip
        elif MASKED:
            q = tl.load(q_ptr + q_offs, mask=live[:, None], other=0.0)
            do = tl.load(do_ptr + do_offs, mask=live[:, None], other=0.0)
        else:
            q = tl.load(q_ptr + q_offs)
            do = tl.load(do_ptr + do_offs)
        # They start the accumulators: subtracted later, they would hold 32 registers a thread and spill.
        scores = tl.dot(k, tl.trans(q), tl.broadcast_to(neg_lse[None, :], (BLOCK_N, BLOCK_M)), input_precision="ieee")
        if (m0 < edges[1]) | (m0 >= edges[2]) if RUNS == 1 else RUN != 1:
            distance = (m0 + offs_m)[None, :] - offs_n[:, None]
            scores = tl.where((distance >= 0) & (distance <= window), scores, float("-inf"))
        less_delta = tl.broadcast_to(neg_delta[None, :], (BLOCK_N, BLOCK_M))
        dp_less_delta = tl.dot(v, tl.trans(do), less_delta, input_precision="ieee")
        p = tl.exp2(scores)
        ds = p * dp_less_delta
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
        if not TMA:
            q_ptr += BLOCK_M * Q_STRIDE
            do_ptr += BLOCK_M * DO_STRIDE
    return dk, dv


@triton.jit
def _attention_dkv_kernel(
    q_source, k_source, v_source, do_source, k_ptr, neg_lse_ptr, neg_delta_ptr, factor_ptr, cos_ptr, sin_ptr,
    ve_ptr, gate_ptr, grad_scale_ptr, dk_ptr, dv_ptr, dve_ptr, dgate_ptr,
    seq_len, window, q_stride_b, v_stride_b,
    ve_stride_b, ve_stride_t, gate_stride_b, gate_stride_t,
    Q_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_VE: tl.constexpr,
    HAS_GRAD_SCALE: tl.constexpr, TMA: tl.constexpr, RUNS: tl.constexpr, AHEAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N keys of one key-value head; the first blocks are seen by the most queries."""
    KV_HEADS: tl.constexpr = NUM_HEADS // GROUP
    NORM_HEADS: tl.constexpr = NUM_HEADS + KV_HEADS
    DO_STRIDE: tl.constexpr = NUM_HEADS * HEAD_DIM
    DQKV_STRIDE: tl.constexpr = (NUM_HEADS + 2 * KV_HEADS) * HEAD_DIM
    blocks = tl.cdiv(seq_len, BLOCK_N)
    n0 = tl.program_id(0) % blocks * BLOCK_N
    row = tl.program_id(0) // blocks  # batch · KV_HEADS + key-value head
    batch, kv_head = (row // KV_HEADS).to(tl.int64), row % KV_HEADS
    k = load_rows(
        k_source, batch, n0, kv_head, seq_len, q_stride_b,
        STRIDE=Q_STRIDE, MASKED=True, TMA=TMA, ROWS=BLOCK_N, HEAD_DIM=HEAD_DIM,
    )  # fmt: skip
    v = load_rows(
        v_source, batch, n0, kv_head, seq_len, v_stride_b,
        STRIDE=V_STRIDE, MASKED=True, TMA=TMA, ROWS=BLOCK_N, HEAD_DIM=HEAD_DIM,
    )  # fmt: skip
    dk = tl.zeros((BLOCK_N, HEAD_DIM), tl.float32)
    dv = tl.zeros((BLOCK_N, HEAD_DIM), tl.float32)
    do_stride_b = tl.full((), DO_STRIDE, tl.int64) * seq_len
    edges = query_runs(n0, seq_len, window, BLOCK_M, BLOCK_N)
    for i in range(GROUP):
        head = kv_head * GROUP + i
        lse_head_ptr = neg_lse_ptr + (batch * NUM_HEADS + head) * seq_len
        delta_head_ptr = neg_delta_ptr + (batch * NUM_HEADS + head) * seq_len
        for run in tl.static_range(RUNS):
            dk, dv = _dkv_run(
                dk, dv, k, v, q_source, do_source, lse_head_ptr, delta_head_ptr, batch, head, edges, n0, seq_len,
                window, q_stride_b, do_stride_b, Q_STRIDE=Q_STRIDE, DO_STRIDE=DO_STRIDE, TMA=TMA,
                RUN=run, RUNS=RUNS, AHEAD=AHEAD, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, HEAD_DIM=HEAD_DIM,
            )  # fmt: skip

    first = batch * seq_len + n0  # the tile's first token
    rows = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, HEAD_DIM)[None, :]
    live = n0 + rows < seq_len
    if HAS_VE:
        offs_t = n0 + rows.to(tl.int64)
        ve_offs = batch * ve_stride_b + offs_t[:, None] * ve_stride_t + kv_head * HEAD_DIM + offs_d
        ve = tl.load(ve_ptr + ve_offs, mask=live[:, None], other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + batch * gate_stride_b + offs_t * gate_stride_t + kv_head, mask=live, other=0.0)
        sigma = tl.sigmoid(gate.to(tl.float32))
        heads = (first + rows) * KV_HEADS + kv_head  # of tensors laid out as [B, T, KVH, ...]
        tl.store(dve_ptr + heads[:, None] * HEAD_DIM + offs_d, 2 * sigma[:, None] * dv, mask=live[:, None])
        tl.store(dgate_ptr + heads, 2 * sigma * (1 - sigma) * tl.sum(dv * ve, axis=1), mask=live)

    factor_ptr += first * NORM_HEADS + NUM_HEADS + kv_head
    factor = tl.load(factor_ptr + rows * NORM_HEADS, mask=live, other=0.0)
    if HAS_GRAD_SCALE:
        grad_scale = tl.load(grad_scale_ptr + first + rows, mask=live, other=0.0)
        factor *= grad_scale
        dv *= grad_scale[:, None]
    tile = first * DQKV_STRIDE + kv_head * HEAD_DIM
    tl.store(dv_ptr + tile + rows[:, None] * DQKV_STRIDE + offs_d, dv, mask=live[:, None])
    k_ptr += batch * q_stride_b + n0.to(tl.int64) * Q_STRIDE + kv_head * HEAD_DIM
    table = n0.to(tl.int64) * (HEAD_DIM // 2)
    rotary_norm_bwd(
        dk, k_ptr, factor, cos_ptr + table, sin_ptr + table,
        dk_ptr + tile, live,
        SQUARE=HEAD_DIM, Y_STRIDE=Q_STRIDE, DX_STRIDE=DQKV_STRIDE, ROWS=BLOCK_N, HEAD_DIM=HEAD_DIM,
    )  # fmt: skip


# Of a head: (head_dim, dtype, heads, tokens of a row, window).
DQ = Choice(
    "attention-dq", [_attention_dq_kernel],
    lambda head_dim, dtype, heads, *row: tiles.config(head_dim, dtype, heads).dq._asdict(), tiles.candidates,
)  # fmt: skip
DKV = Choice(
    "attention-dkv", [_attention_dkv_kernel],
    lambda head_dim, dtype, heads, *row: tiles.config(head_dim, dtype, heads).dkv._asdict(), tiles.dkv_candidates,
)  # fmt: skip


def attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, neg_lse: Tensor, factors: Tensor,
    cos: Tensor, sin: Tensor, ve: Tensor | None, gate: Tensor | None, window: int, grad_scale: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(dqkv [B, T, (H + 2·KVH)·head_dim], dve, dgate): what the forward's tensors were made of, in their dtypes."""
    B, T, width = out.shape
    head_dim = 2 * cos.shape[-1]
    num_heads, num_kv_heads = width // head_dim, k.shape[-1] // head_dim
    group, window = num_heads // num_kv_heads, min(window, T)
    dout = dout.contiguous()
    dqkv = torch.empty(B, T, (num_heads + 2 * num_kv_heads) * head_dim, dtype=out.dtype, device=out.device)
    dq, dk, dv = dqkv.split([width, k.shape[-1], k.shape[-1]], dim=-1)
    dve = None if ve is None else torch.empty(ve.shape, dtype=ve.dtype, device=ve.device)
    dgate = None if ve is None else torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    neg_delta = torch.empty_like(neg_lse)
    shape = head_dim, out.dtype, num_heads, T, window

    block = tiles.Tiles(**DQ(*shape))
    tma = block.tma and fits_tma(q, k, v, dout)
    _attention_dq_kernel[(triton.cdiv(T, block.block_m) * B * num_heads,)](
        row_source(q, block.block_m, head_dim, tma), row_source(k, block.block_n, head_dim, tma),
        row_source(v, block.block_n, head_dim, tma), row_source(dout, block.block_m, head_dim, tma),
        q, out, neg_lse, neg_delta, factors, cos, sin, grad_scale, dq,
        T, window, q.stride(0), v.stride(0),
        Q_STRIDE=q.stride(1), V_STRIDE=v.stride(1),
        NUM_HEADS=num_heads, GROUP=group, HEAD_DIM=head_dim, HAS_GRAD_SCALE=grad_scale is not None,
        NARROW=block.both_edges(window), TMA=tma, RUNS=block.runs,
        BLOCK_M=block.block_m, BLOCK_N=block.block_n, num_warps=block.num_warps, num_stages=block.num_stages,
    )  # fmt: skip
    block = tiles.Tiles(**DKV(*shape))
    tma = block.tma and fits_tma(q, k, v, dout)
    _attention_dkv_kernel[(triton.cdiv(T, block.block_n) * B * num_kv_heads,)](
        row_source(q, block.block_m, head_dim, tma), row_source(k, block.block_n, head_dim, tma),
        row_source(v, block.block_n, head_dim, tma), row_source(dout, block.block_m, head_dim, tma),
        k, neg_lse, neg_delta, factors, cos, sin, ve, gate, grad_scale, dk, dv, dve, dgate,
        T, window, q.stride(0), v.stride(0),
        0 if ve is None else ve.stride(0), 0 if ve is None else ve.stride(1),
        0 if ve is None else gate.stride(0), 0 if ve is None else gate.stride(1),
        Q_STRIDE=q.stride(1), V_STRIDE=v.stride(1),
        NUM_HEADS=num_heads, GROUP=group, HEAD_DIM=head_dim, HAS_VE=ve is not None,
        HAS_GRAD_SCALE=grad_scale is not None,
        TMA=tma, RUNS=block.runs, AHEAD=block.num_stages if block.ahead else None,
        BLOCK_M=block.block_m, BLOCK_N=block.block_n, num_warps=block.num_warps, num_stages=block.num_stages,
    )  # fmt: skip
    if dgate is not None and grad_scale is not None:  # small; in the kernel it would spill
        dgate.mul_(grad_scale[..., None])
    return dqkv, dve, dgate
