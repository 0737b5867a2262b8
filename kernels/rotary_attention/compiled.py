"""Windowed attention as a compiled model runs it: the best that PyTorch offers without kernels of our own.

On a CUDA device FlashAttention-3 where `flash_attn_interface` can be imported on a Hopper, as the published system uses
it, else FlexAttention with a block mask, which skips the tiles outside the window as our kernels do. On a CPU
FlexAttention has no backward (seen in torch 2.11 and 2.13), and `scaled_dot_product_attention` takes several times as
long as batched products over the blocks that are seen, with a softmax that the compiler fuses (bench/LOG.md).
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from ..common import upcast
from ..cpu.attention import blocks
from .reference import window_attention_ref, window_mask

try:
    from flash_attn_interface import flash_attn_func
except ImportError:  # it is built from source, so most machines have none
    flash_attn_func = None

# By (T, window, device). Made before the model is traced: inside its graph each micro-step would make them anew.
_block_masks: dict[tuple[int, int, torch.device], BlockMask] = {}


def _has_flash_attention_3(device: torch.device) -> bool:
    return flash_attn_func is not None and torch.cuda.get_device_capability(device)[0] == 9


def compiled_attention(device: torch.device) -> str:
    """The name of what a compiled model attends with on `device`."""
    if device.type != "cuda":
        return "products"
    return "FlashAttention-3" if _has_flash_attention_3(device) else "FlexAttention"


def window_block_mask(seq_len: int, window: int, device: torch.device) -> BlockMask:
    """`window_mask` by blocks of 128 × 128. A block where every pair counts needs no mask inside the kernel."""

    def visible(batch, head, query, key):
        return (query >= key) & (query - key <= window)

    return create_block_mask(visible, None, None, seq_len, seq_len, device=device)


def prepare_compiled_attention(seq_len: int, windows: list[int], device: torch.device) -> None:
    """Makes the block masks of a model that is about to be compiled, where its attention reads any."""
    if compiled_attention(device) == "FlexAttention":
        for window in set(windows):
            _block_masks[seq_len, window, device] = window_block_mask(seq_len, window, device)


def flex_window_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """`window_attention_ref` by FlexAttention, for the lengths that `prepare_compiled_attention` has made masks for; by
    itself for others, which are few and short rows: an audit's."""
    mask = _block_masks.get((q.shape[1], window, q.device))
    if mask is None:
        return window_attention_ref(q, k, v, window)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, T, head_dim]
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=k.shape[1] != q.shape[1]).transpose(1, 2)


def flash_window_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """`window_attention_ref` by FlashAttention-3."""
    out = flash_attn_func(q, k, v, causal=True, window_size=(window, 0))
    return out[0] if isinstance(out, tuple) else out  # older builds return the log-sum-exp as well


def block_window_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """`window_attention_ref` by batched products, a block of queries with the keys that one of them sees."""
    T, scale = q.shape[1], q.shape[-1] ** -0.5
    groups = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, T, head_dim]
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    outs = []
    for start, first, end in blocks(T, window):
        seen = window_mask(end - first, window, q.device)[start - first :]
        scores = upcast(q[:, :, start:end] @ k[:, :, first:end].mT) * scale
        weights = torch.where(seen, scores, -torch.inf).softmax(-1).to(v.dtype)
        outs.append(weights @ v[:, :, first:end])
    return torch.cat(outs, dim=2).transpose(1, 2)


def compiled_window_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """`window_attention_ref` as fast as PyTorch has it: what a compiled model runs."""
    attention = {
        "products": block_window_attention,
        "FlexAttention": flex_window_attention,
        "FlashAttention-3": flash_window_attention,
    }[compiled_attention(q.device)]
    return attention(q, k, v, window)
