"""`rotary_attention` on a CPU: batched products over blocks of queries and the keys that they see.

q and k are normed, so |q·k| ≤ head_dim, and no score is above √head_dim: the softmax needs no maximum. The factor
log₂e / √head_dim is in q, so that scores are exponents of 2.

    P = 2^(q·k), 0 where it is not seen;  l = Σ P;  out = P·v / l
    dP/l = (dout/l)·vᵀ;  δ = ⟨dout/l, out⟩;  dS = P ⊙ (dP/l − δ);  dq = dS·k;  dk = dSᵀ·q;  dv = Pᵀ·(dout/l)

Scores are in the dtype of qkv. Nothing of size T² is kept for the backward: it makes P again.
"""

import functools
import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common import EPS, upcast

BLOCK = 128  # queries
LOG2_E = 1 / math.log(2)


@functools.lru_cache(maxsize=64)
def _mask(queries: int, before: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[queries, before + queries], to be added to scores: 0 where query i sees key j of those that begin `before` keys
    before the first query, −inf where it does not."""
    query, key = torch.arange(queries, device=device), torch.arange(before + queries, device=device)
    distance = before + query[:, None] - key
    hidden = (distance < 0) | (distance > window)
    return torch.zeros(distance.shape, dtype=dtype, device=device).masked_fill_(hidden, -math.inf)


def blocks(T: int, window: int):
    """Of each block of queries: first query, first key that one of them sees, end of both."""
    for start in range(0, T, BLOCK):
        yield start, max(0, start - window), min(start + BLOCK, T)


def _weights(q: Tensor, k: Tensor, window: int, start: int, first: int, end: int) -> Tensor:
    """P of a block: [heads, queries, keys]."""
    mask = _mask(end - start, start - first, window, q.dtype, q.device)
    scores = torch.baddbmm(mask.expand(q.shape[0], -1, -1), q[:, start:end], k[:, first:end].mT)
    return scores.exp2_()


def _attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """q, k, v: [heads, T, head_dim]. Returns out, the same, and l [heads, T, 1] in fp32."""
    out = torch.empty_like(q)
    wide = torch.promote_types(q.dtype, torch.float32)
    total = q.new_empty(*q.shape[:2], 1, dtype=wide)
    for start, first, end in blocks(q.shape[1], window):
        P = _weights(q, k, window, start, first, end)
        torch.sum(P, -1, keepdim=True, dtype=wide, out=total[:, start:end])
        out[:, start:end] = torch.bmm(P, v[:, first:end]) / total[:, start:end]
    return out, total


def _attention_backward(dout: Tensor, q, k, v, out, total, window: int) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dout = (dout / total).to(q.dtype)
    delta = torch.linalg.vecdot(upcast(dout), upcast(out)).neg_().to(q.dtype).unsqueeze(-1)
    for start, first, end in blocks(q.shape[1], window):
        P = _weights(q, k, window, start, first, end)
        d, keys = dout[:, start:end], slice(first, end)
        dv[:, keys].baddbmm_(P.mT, d)
        dS = torch.baddbmm(delta[:, start:end].expand_as(P), d, v[:, keys].mT).mul_(P)
        torch.bmm(dS, k[:, keys], out=dq[:, start:end])
        dk[:, keys].baddbmm_(dS.mT, q[:, start:end])
    return dq, dk, dv


def _to_heads(x: Tensor) -> Tensor:
    """[B, T, N, head_dim] as [B·N, T, head_dim]."""
    B, T, N, head_dim = x.shape
    return x.transpose(1, 2).reshape(B * N, T, head_dim)


def _from_heads(x: Tensor, B: int) -> Tensor:
    """[B·N, T, head_dim] as a view [B, T, N, head_dim]."""
    return x.view(B, -1, *x.shape[1:]).transpose(1, 2)


def _repeated(x: Tensor, groups: int) -> Tensor:
    """Each key-value head for all queries' heads that read it."""
    return x if groups == 1 else x.repeat_interleave(groups, dim=0)


def _summed(x: Tensor, groups: int) -> Tensor:
    return x if groups == 1 else x.view(-1, groups, *x.shape[1:]).sum(1)


def _rotate(x1: Tensor, x2: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return (x1 * cos).addcmul_(x2, sin), (x2 * cos).addcmul_(x1, sin, value=-1)


def _contiguous(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype, memory_format=torch.contiguous_format).contiguous()


def _slow(half_of_keys: Tensor) -> Tensor:
    """Of one half of the channels [B, KVH, T, half], those that turn slowly."""
    return half_of_keys[..., half_of_keys.shape[-1] // 2 :]


def _offset_(half_of_keys: Tensor) -> None:
    """The slow channels of each key are those of the one before; the first keeps its own."""
    slow = _slow(half_of_keys)
    slow[:, :, 1:] = slow[:, :, :-1].clone()


def _offset_backward_(grad: Tensor) -> None:
    slow = _slow(grad)
    first = slow[:, :, 0].clone()
    slow[:, :, :-1] = slow[:, :, 1:].clone()
    slow[:, :, -1] = 0
    slow[:, :, 0] += first


class _RotaryAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin, num_heads, window, ve, gate, key_offset):
        B, T, width = qkv.shape
        half = cos.shape[-1]
        head_dim = 2 * half
        normed = (width // head_dim + num_heads) // 2  # heads of queries and keys
        heads = qkv.view(B, T, -1, head_dim)
        wide = torch.promote_types(qkv.dtype, torch.float32)

        # The halves apart, and heads before tokens: then every pass below is over whole stretches of memory.
        x = heads[:, :, :normed].transpose(1, 2)
        x1, x2 = (_contiguous(part, wide) for part in x.split(half, dim=-1))  # [B, N, T, half]
        cos, sin = cos[:T].to(wide), sin[:T].to(wide)
        if key_offset:
            _offset_(x1[:, num_heads:])
            _offset_(x2[:, num_heads:])
        squares = torch.linalg.vecdot(x1, x1).add_(torch.linalg.vecdot(x2, x2))
        rstd = squares.div_(head_dim).add_(EPS).rsqrt_().unsqueeze(-1)
        scale = LOG2_E / math.sqrt(head_dim)
        rstd[:, :num_heads] *= scale
        y1, y2 = _rotate(x1.mul_(rstd), x2.mul_(rstd), cos, sin)
        y = qkv.new_empty(B, normed, T, head_dim)
        y[..., :half], y[..., half:] = y1, y2
        q, k = (part.reshape(-1, T, head_dim) for part in y.split([num_heads, normed - num_heads], dim=1))

        v, weight = heads[:, :, normed:], None
        if ve is not None:
            weight = torch.sigmoid(upcast(gate)).mul_(2).unsqueeze(-1)  # [B, T, KVH, 1]
            v = torch.addcmul(v.to(wide), weight, ve.view(v.shape).to(wide)).to(qkv.dtype)
        v = _to_heads(v)
        groups = q.shape[0] // k.shape[0]
        out, total = _attention(q, _repeated(k, groups), _repeated(v, groups), window)
        ctx.save_for_backward(q, k, v, out, total, y1, y2, rstd, cos, sin, ve, weight)
        ctx.num_heads, ctx.window, ctx.scale, ctx.key_offset = num_heads, window, scale, key_offset
        return _from_heads(out, B).reshape(B, T, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, out, total, y1, y2, rstd, cos, sin, ve, weight = ctx.saved_tensors
        B, normed, T, half = y1.shape
        head_dim, wide = 2 * half, y1.dtype
        groups = q.shape[0] // k.shape[0]
        dout = _to_heads(dout.view(B, T, -1, head_dim))
        dq, dk, dv = _attention_backward(dout, q, _repeated(k, groups), _repeated(v, groups), out, total, ctx.window)
        dk, dv = _summed(dk, groups), _from_heads(_summed(dv, groups), B)

        g1, g2 = torch.empty_like(y1), torch.empty_like(y2)
        for part, grad in ((slice(ctx.num_heads), dq), (slice(ctx.num_heads, None), dk)):
            grad = grad.view(B, -1, T, head_dim)
            g1[:, part], g2[:, part] = grad[..., :half], grad[..., half:]
        # Of y = r·rotated, r the rstd with the scale: r·(dy − y·⟨dy, y⟩ / (head_dim·scale²)). The ln 2 is the scores'.
        mean = torch.linalg.vecdot(g1, y1).add_(torch.linalg.vecdot(g2, y2)).div_(head_dim).unsqueeze(-1)
        mean[:, : ctx.num_heads] /= ctx.scale**2
        rstd = rstd * math.log(2)
        for g, y in ((g1, y1), (g2, y2)):
            g.addcmul_(y, mean, value=-1).mul_(rstd)
        x1, x2 = _rotate(g1, g2, cos, -sin)
        if ctx.key_offset:
            _offset_backward_(x1[:, ctx.num_heads :])
            _offset_backward_(x2[:, ctx.num_heads :])

        dqkv = q.new_empty(B, T, normed + dv.shape[2], head_dim)
        dx = dqkv[:, :, :normed].transpose(1, 2)
        dx[..., :half], dx[..., half:], dqkv[:, :, normed:] = x1, x2, dv
        dve = dgate = None
        if ve is not None:
            dv = dv.to(wide)
            dve = (weight * dv).to(ve.dtype).view(ve.shape)
            dgate = torch.linalg.vecdot(dv, ve.view(dv.shape).to(wide)) * (weight - weight.square() / 2)[..., 0]
            dgate = dgate.to(q.dtype)
        return dqkv.view(B, T, -1), None, None, None, None, dve, dgate, None


def rotary_attention_cpu(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, window: int, ve: Tensor | None = None,
    gate: Tensor | None = None, key_offset: bool = False,
) -> Tensor:  # fmt: skip
    """`rotary_attention`."""
    return _RotaryAttention.apply(qkv, cos, sin, num_heads, window, ve, gate, key_offset)
