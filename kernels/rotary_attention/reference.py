"""The op in plain PyTorch: what the kernels are checked against, and what a CPU runs."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import EPS, upcast

ROTARY_BASE = 10_000.0


def rotary_tables(seq_len: int, head_dim: int, base: float = ROTARY_BASE, device=None) -> tuple[Tensor, Tensor]:
    """cos and sin of position · base^(−2i/head_dim): two fp32 tensors [seq_len, head_dim / 2]."""
    inv_freq = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)
    angle = torch.arange(seq_len, dtype=torch.float64, device=device)[:, None] * inv_freq
    return angle.cos().float(), angle.sin().float()


def rotary_norm_ref(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the halves of [B, T, H, head_dim] by position, then takes the RMSNorm over head_dim."""
    x = upcast(x)
    x1, x2 = x.chunk(2, dim=-1)
    cos, sin = cos[: x.shape[1], None].to(x.dtype), sin[: x.shape[1], None].to(x.dtype)
    y = torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)
    return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + EPS)


def window_mask(seq_len: int, window: int, device=None) -> Tensor:
    """[T, T] booleans, true where query (row) t may see key (column) j: t − window ≤ j ≤ t."""
    distance = torch.arange(seq_len, device=device)[:, None] - torch.arange(seq_len, device=device)
    return (distance >= 0) & (distance <= window)


def window_attention_ref(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Softmax attention under `window_mask`. q: [B, T, H, head_dim]; k, v: [B, T, KVH, head_dim]; returns as q."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, T, head_dim]
    mask = window_mask(q.shape[2], window, q.device)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=k.shape[1] != q.shape[1])
    return out.transpose(1, 2)


def key_offset_ref(k: Tensor) -> Tensor:
    """Keys [B, T, KVH, head_dim], their slow rotary pairs those of the token before; position 0 keeps its own."""
    before = torch.cat([k[:, :1], k[:, :-1]], dim=1)
    half = k.shape[-1] // 2
    slow = torch.arange(2 * half, device=k.device) % half >= half // 2
    return torch.where(slow, before, k)


def rotary_attention_ref(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    window: int,
    ve: Tensor | None = None,
    gate: Tensor | None = None,
    attention: Callable[[Tensor, Tensor, Tensor, int], Tensor] = window_attention_ref,
    key_offset: bool = False,
) -> Tensor:
    B, T, width = qkv.shape
    head_dim = 2 * cos.shape[-1]
    num_kv_heads = (width // head_dim - num_heads) // 2
    q, k, v = qkv.view(B, T, -1, head_dim).split([num_heads, num_kv_heads, num_kv_heads], dim=2)
    if ve is not None:
        weight = 2 * torch.sigmoid(upcast(gate))[..., None]  # [B, T, KVH, 1]
        v = (upcast(v) + weight * upcast(ve.view(v.shape))).to(v.dtype)
    if key_offset:
        k = key_offset_ref(k)
    q = rotary_norm_ref(q, cos, sin).to(qkv.dtype)
    k = rotary_norm_ref(k, cos, sin).to(qkv.dtype)
    return attention(q, k, v, window).reshape(B, T, num_heads * head_dim)
