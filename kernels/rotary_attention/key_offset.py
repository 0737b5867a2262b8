"""Partial key offset: the slow half of a key's channels is that of the token before.

    k[t, slow] ← k[t − 1, slow];  k[0, slow] stays        slow: rotary pairs (i, i + head_dim/2) with i ≥ head_dim/4

In channels of a head: [d/4, d/2) and [3d/4, d), whose angles turn least from token to token. One key then says what its
token is and what came before it, so that one layer can look for "what followed this". Source: modded-nanogpt, record
of 2025-12-14 (pull request 169 of KellerJordan/modded-nanogpt, by ClassicLarry). There these channels are not rotated
at all, and the offset comes after rotary and norm; here it comes before both, on what was projected.

Backward, the transpose:  dk[t] = dy[t + 1], of the last token 0, and of the first dy[0] + dy[1]  (slow channels).

Both work in place, on qkv and on its gradient. One program has a block of a row's columns, d/4 of them, for all tokens
of a sequence, and walks over them in steps of ROWS: from the end forward, from the start backward. So what a step
writes, no later step reads, and a barrier stands between the loads of a step and its stores: another thread of the
program reads what this one writes. No other program touches these columns.

Bytes a token at 4 key heads of 128 in bf16, forward and backward alike: half of the keys, 0.5 KB in and 0.5 KB out.
"""

import torch
from torch import Tensor

from ..choice import Choice, Tile, elements, grid
from ..common import tl, triton


@triton.jit
def _key_offset_fwd_kernel(
    k_ptr, seq_len, k_stride_b, k_stride_t,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: the slow channels of one half of one head. Every token but the first takes those of the one before
    it; the last tokens come first."""
    QUARTER: tl.constexpr = HEAD_DIM // 4
    batch, half = tl.program_id(0) // (2 * KV_HEADS), tl.program_id(0) % (2 * KV_HEADS)
    block = k_ptr + batch.to(tl.int64) * k_stride_b + half * 2 * QUARTER + QUARTER + tl.arange(0, QUARTER)[None, :]
    steps = tl.cdiv(seq_len, ROWS)
    for step in range(steps):
        t = (steps - 1 - step) * ROWS + tl.arange(0, ROWS)
        mask = ((t > 0) & (t < seq_len))[:, None]
        rows = block + t.to(tl.int64)[:, None] * k_stride_t  # [ROWS, QUARTER]
        before = tl.load(rows - k_stride_t, mask=mask, other=0.0)
        tl.debug_barrier()
        tl.store(rows, before, mask=mask)


@triton.jit
def _key_offset_bwd_kernel(
    dk_ptr, grad_scale_ptr, seq_len, dk_stride_b, dk_stride_t,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_GRAD_SCALE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: the slow channels of one half of one head. Every token takes the gradient of the one after it, and
    the first one keeps its own too. With a scale they come multiplied by that of their token, and leave so."""
    QUARTER: tl.constexpr = HEAD_DIM // 4
    batch, half = tl.program_id(0) // (2 * KV_HEADS), tl.program_id(0) % (2 * KV_HEADS)
    block = dk_ptr + batch.to(tl.int64) * dk_stride_b + half * 2 * QUARTER + QUARTER + tl.arange(0, QUARTER)[None, :]
    of_first = tl.load(block).to(tl.float32)  # [1, QUARTER], before the first step writes over it
    for first in range(0, seq_len, ROWS):
        t = first + tl.arange(0, ROWS)
        follows = t < seq_len - 1
        rows = block + t.to(tl.int64)[:, None] * dk_stride_t  # [ROWS, QUARTER]
        after = tl.load(rows + dk_stride_t, mask=follows[:, None], other=0.0).to(tl.float32)
        if HAS_GRAD_SCALE:
            scales = grad_scale_ptr + batch.to(tl.int64) * seq_len + t
            scale = tl.load(scales, mask=follows, other=1.0)
            after *= (scale / tl.load(scales + 1, mask=follows, other=1.0))[:, None]
        dk = tl.where((t == 0)[:, None], of_first + after, after)
        tl.debug_barrier()
        tl.store(rows, dk, mask=(t < seq_len)[:, None])


def _config(head_dim: int, dtype: torch.dtype) -> Tile:
    """32 elements a thread. 128 sequences of 4 heads are 1,024 programs, which a large GPU has room for all at once,
    each with 8 KB on the way in bf16. Not yet by times."""
    return {"ROWS": 16384 // head_dim, "num_warps": 4}


# Of a key head: (head_dim, dtype). Fewer elements than 8 a thread are no vector of 16 bytes in bf16.
KEY_OFFSET = Choice(
    "attention-key-offset", [_key_offset_fwd_kernel, _key_offset_bwd_kernel], _config,
    lambda head_dim, dtype: grid(elements(lambda tile: tile["ROWS"] * head_dim // 4, 8, 32),
                                 ROWS=(64, 128, 256, 512), num_warps=(2, 4, 8)),
)  # fmt: skip


def key_offset_fwd_(k: Tensor, head_dim: int) -> None:
    """k [B, T, KVH·head_dim], as it was projected, overwritten. Strides of the first two dimensions may be any."""
    B, T, width = k.shape
    kv_heads = width // head_dim
    _key_offset_fwd_kernel[(B * kv_heads * 2,)](
        k, T, k.stride(0), k.stride(1), KV_HEADS=kv_heads, HEAD_DIM=head_dim, **KEY_OFFSET(head_dim, k.dtype),
    )  # fmt: skip


def key_offset_bwd_(dk: Tensor, head_dim: int, grad_scale: Tensor | None) -> None:
    """dk [B, T, KVH·head_dim], the gradient of what `key_offset_fwd_` left, overwritten by that of what it was given.
    With `grad_scale` [B, T], contiguous, both are multiplied by it, token by token."""
    B, T, width = dk.shape
    kv_heads = width // head_dim
    _key_offset_bwd_kernel[(B * kv_heads * 2,)](
        dk, grad_scale, T, dk.stride(0), dk.stride(1),
        KV_HEADS=kv_heads, HEAD_DIM=head_dim, HAS_GRAD_SCALE=grad_scale is not None, **KEY_OFFSET(head_dim, dk.dtype),
    )  # fmt: skip
