"""Causal sliding-window attention with all that surrounds it between two matrix products.

    q, k, v = split(qkv)
    v ← v + 2·σ(gate)·ve                                  (on layers with a value embedding)
    k[t, slow] ← k[t − 1, slow] for t > 0                 (with a key offset: key_offset.py)
    q, k ← norm(rotary(q)), norm(rotary(k))               halves rotated: (x₁c + x₂s, x₂c − x₁s)
    out[t] = Σ_j softmax_j(q[t]·k[j] / √head_dim) · v[j]    over t − window ≤ j ≤ t

A window of S is S + 1 keys: S back, and the token itself. Rotary: Su et al., arXiv 2104.09864; QK-norm:
Henry et al., arXiv 2010.04245; value embeddings: Zhou et al., arXiv 2410.17897; the tiling: Dao, arXiv 2307.08691.

Saved for backward: qkv with normed q and k (q scaled too) and mixed v in place of what was projected (a copy, unless
the caller lets the kernels overwrite theirs), ve and gate, out, the factors of q and k and the log-sum-exp (fp32).
Bytes a token at 4 heads of 128 in bf16, as launched, reading each tile once:

    prologue   2 KB of q and k in, 2 KB out; with ve 3 KB more       attention     3 KB in, 1 KB out
    dq         5 KB in, 1 KB out                                     dk and dv     4 KB in, 2 KB out; with ve 2 KB more
    key offset 0.5 KB in, 0.5 KB out, forward and backward

FLOPs a token, W the mean number of visited keys: forward 4·H·head_dim·W; backward 14·H·head_dim·W as launched (scores
and their gradient once for dq, once more for dk and dv), 10·H·head_dim·W as `cost` counts them.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common import GradScaled, use_cpu_forms, use_kernels
from ..cpu import rotary_attention_cpu
from .backward import attention_bwd
from .compiled import compiled_attention, compiled_window_attention, prepare_compiled_attention
from .forward import attention_fwd
from .key_offset import key_offset_bwd_, key_offset_fwd_
from .prologue import prologue_fwd_
from .reference import ROTARY_BASE, rotary_attention_ref, rotary_norm_ref, rotary_tables, window_mask

__all__ = [
    "HEAD_DIMS",
    "ROTARY_BASE",
    "compiled_attention",
    "cost",
    "prepare_compiled_attention",
    "rotary_attention",
    "rotary_attention_ref",
    "rotary_norm_ref",
    "rotary_tables",
    "window_mask",
]

HEAD_DIMS = (16, 32, 64, 128)  # the kernels hold a head in one tile


def _check(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, window: int, ve: Tensor | None, gate: Tensor | None,
    grad_scale: Tensor | None,
) -> int:  # fmt: skip
    """The number of key-value heads; ValueError for what the kernels cannot read."""
    if qkv.ndim != 3 or min(qkv.shape) < 1:
        raise ValueError(f"qkv {tuple(qkv.shape)} must be [B, T, width], none of them 0")
    B, T, width = qkv.shape
    head_dim = 2 * cos.shape[-1]
    num_kv_heads = (width // head_dim - num_heads) // 2
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim {head_dim} must be one of {', '.join(map(str, HEAD_DIMS))}")
    if num_heads < 1 or num_kv_heads < 1 or (num_heads + 2 * num_kv_heads) * head_dim != width:
        raise ValueError(f"width {width} is not (H + 2·KVH)·head_dim with H = {num_heads}, head_dim = {head_dim}")
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} heads must be a multiple of {num_kv_heads} key-value heads")
    if window < 0:
        raise ValueError(f"window {window} must not be negative")
    for name, x in (("cos", cos), ("sin", sin)):
        if x.shape != (cos.shape[0], head_dim // 2) or x.shape[0] < T or x.dtype != torch.float32:
            raise ValueError(f"{name} {tuple(x.shape)} {x.dtype} must be fp32, [≥ {T}, {head_dim // 2}]")
        if not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
    if (ve is None) != (gate is None):
        raise ValueError("ve and gate come together")
    scale = grad_scale
    if scale is not None and (scale.shape != (B, T) or scale.dtype != torch.float32 or not scale.is_contiguous()):
        raise ValueError(f"grad_scale {tuple(scale.shape)} {scale.dtype} must be contiguous, {(B, T)} float32")
    inputs = [("qkv", qkv, width)]
    if ve is not None:
        inputs += [("ve", ve, num_kv_heads * head_dim), ("gate", gate, num_kv_heads)]
    for name, x, last in inputs:
        if x.shape != (B, T, last) or x.dtype != qkv.dtype or x.device != qkv.device:
            raise ValueError(
                f"{name} {tuple(x.shape)} {x.dtype} on {x.device} must be "
                f"{(B, T, last)} {qkv.dtype} on {qkv.device}"
            )
        if x.stride(2) != 1 and last > 1:
            raise ValueError(f"the last dimension of {name} must be contiguous, its stride is {x.stride(2)}")
    return num_kv_heads


class _RotaryAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin, num_heads, window, ve, gate, overwrite, grad_scale, key_offset):
        num_kv_heads = _check(qkv, cos, sin, num_heads, window, ve, gate, grad_scale)
        head_dim = 2 * cos.shape[-1]
        qkv = qkv.detach() if overwrite else qkv.clone(memory_format=torch.contiguous_format)
        ctx.widths = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
        if key_offset:
            key_offset_fwd_(qkv.split(ctx.widths, dim=-1)[1], head_dim)
        factors = prologue_fwd_(qkv, cos, sin, num_heads, num_kv_heads, ve, gate)
        out, neg_lse = attention_fwd(*qkv.split(ctx.widths, dim=-1), head_dim, window)
        ctx.save_for_backward(qkv, out, neg_lse, factors, cos, sin, ve, gate, grad_scale)
        ctx.window, ctx.head_dim, ctx.key_offset = window, head_dim, key_offset
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        qkv, *saved, grad_scale = ctx.saved_tensors
        q, k, v = qkv.split(ctx.widths, dim=-1)
        dqkv, dve, dgate = attention_bwd(dout, q, k, v, *saved, ctx.window, grad_scale)
        if ctx.key_offset:
            key_offset_bwd_(dqkv.split(ctx.widths, dim=-1)[1], ctx.head_dim, grad_scale)
        return dqkv, None, None, None, None, dve, dgate, None, None, None


def rotary_attention(
    qkv: Tensor | GradScaled,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    window: int,
    ve: Tensor | None = None,
    gate: Tensor | GradScaled | None = None,
    overwrite: bool = False,
    key_offset: bool = False,
) -> Tensor:
    """Attention over the packed projections of one layer.

    Args:
        qkv: [B, T, (H + 2·KVH)·head_dim], the query heads first, then keys, then values.
        cos, sin: [≥ T, head_dim / 2], fp32, from `rotary_tables`.
        num_heads: H, a multiple of KVH.
        window: keys back that a query sees, besides its own.
        ve: [B, T, KVH·head_dim], the tokens' value embeddings; with it `gate`, [B, T, KVH], before the sigmoid.
        overwrite: the caller needs qkv no more, and the kernels may work in its memory instead of in a copy.
        key_offset: the slow half of each key's channels is that of the token before. head_dim is a multiple of 4.

    Where qkv and gate come as `GradScaled`, from a `qkv_projection` of factors, the kernels multiply their gradients by
    its scale, [B, T] in fp32, token by token, while they have them in registers. References give them as they are.

    Returns:
        [B, T, H·head_dim], in the dtype of `qkv`.

    Raises:
        ValueError: the kernels do not take these shapes, dtypes or strides (each last dimension must be contiguous).
    """
    scaled = isinstance(qkv, GradScaled)
    if gate is not None and (isinstance(gate, GradScaled) != scaled or (scaled and gate.scale is not qkv.scale)):
        raise ValueError("qkv and gate come from one qkv_projection: both as GradScaled, or neither")
    qkv, grad_scale = qkv if scaled else (qkv, None)
    gate = gate.tensor if scaled and gate is not None else gate
    if use_kernels(qkv):
        return _RotaryAttention.apply(qkv, cos, sin, num_heads, window, ve, gate, overwrite, grad_scale, key_offset)
    if use_cpu_forms():
        return rotary_attention_cpu(qkv, cos, sin, num_heads, window, ve, gate, key_offset)
    if torch.compiler.is_compiling():
        attention = compiled_window_attention
        return rotary_attention_ref(qkv, cos, sin, num_heads, window, ve, gate, attention, key_offset)
    return rotary_attention_ref(qkv, cos, sin, num_heads, window, ve, gate, key_offset=key_offset)


def cost(
    batch: int,
    seq_len: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window: int,
    has_ve: bool = False,
    key_offset: bool = False,
    itemsize: int = 2,
    backward: bool = False,
) -> tuple[int, int]:
    """(bytes, FLOPs) of the op itself: every input read once, every output written once, only visited pairs counted.

    Forward: qkv, ve and gate in, out out; 2 products. Backward: the same inputs, out and its gradient in, the gradients
    of qkv, ve and gate out; 5 products, the scores' recomputation one of them. A key offset adds nothing: who reads the
    keys could read each slow half a token earlier.
    """
    w = min(window, seq_len - 1)
    pairs = batch * num_heads * ((w + 1) * seq_len - w * (w + 1) // 2)
    qkv = (num_heads + 2 * num_kv_heads) * head_dim
    value = num_kv_heads * (head_dim + 1) if has_ve else 0
    out = num_heads * head_dim
    elements = 2 * (qkv + value + out) if backward else qkv + value + out
    return batch * seq_len * elements * itemsize, (5 if backward else 2) * 2 * head_dim * pairs
