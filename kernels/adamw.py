"""AdamW, for all tensors of a group.

    m ← β₁m + (1−β₁)g;  v ← β₂v + (1−β₂)g²;  w ← w·(1 − lr·wd) − lr·(m / (1−β₁ᵗ)) / (sqrt(v / (1−β₂ᵗ)) + eps)

One launch updates every tensor of a group: a small table on the device holds their addresses, and a program finds in it
the tensor that its block of elements belongs to. Addresses do not change during a run, so the table is made once for
each set of them and kept: a captured step reads it at every replay.

w, m, v, g: fp32, any shapes, contiguous; the copy that the forward reads: w rounded, in 16 bits or absent.
Bytes per element: 30 with a bf16 copy (w, m, v read and written, g read, copy written), 28 without. FLOPs: about 14.
Where wd is 0 every bit is what it would be without decay. Source: Kingma & Ba, arXiv 1412.6980; Loshchilov & Hutter,
arXiv 1711.05101.
"""

import functools

import torch
from torch import Tensor

from .choice import Choice, Tile, grid
from .common import tl, triton, use_cpu_forms, use_kernels
from .cpu import adamw_update_cpu

# Columns of a row of hyperparameters (fp32, on the device: a captured step reads them anew at every replay).
LR, BIAS1, BIAS2, DECAY = 0, 1, 2, 3


@torch.no_grad()
def adamw_update_ref(
    masters: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    copies: list[Tensor | None],
    hyper: Tensor,
    apply: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    beta1, beta2 = betas
    for master, grad, m, v, copy in zip(masters, grads, exp_avgs, exp_avg_sqs, copies, strict=True):
        new_m = m.lerp(grad, 1 - beta1)
        new_v = v.lerp(grad.square(), 1 - beta2)
        update = (new_m / hyper[BIAS1]) / ((new_v / hyper[BIAS2]).sqrt() + eps)
        new_master = master * (1 - hyper[LR] * hyper[DECAY]) - hyper[LR] * update
        for old, new in ((m, new_m), (v, new_v), (master, new_master)):
            old.copy_(torch.where(apply, new, old))
        if copy is not None:
            copy.copy_(master)


@triton.jit
def _adamw_kernel(
    table_ptr, hyper_ptr, apply_ptr, tensors, lerp1, lerp2, eps,
    COPY_DTYPE: tl.constexpr, WHOLE_VECTORS: tl.constexpr, MAX_TENSORS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of the table: master, gradient, m, v, copy (0 for none), elements, first block."""
    if tl.load(apply_ptr):
        pid = tl.program_id(0)
        index = tl.arange(0, MAX_TENSORS)
        first_blocks = tl.load(table_ptr + index * 7 + 6, mask=index < tensors, other=1 << 62)
        row = table_ptr + (tl.sum((first_blocks <= pid).to(tl.int32)) - 1) * 7
        # The launcher has checked the alignment that the compiler cannot see through a loaded address.
        master_ptr = tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.float32)), 16)
        grad_ptr = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(tl.float32)), 16)
        m_ptr = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(tl.float32)), 16)
        v_ptr = tl.multiple_of(tl.load(row + 3).to(tl.pointer_type(tl.float32)), 16)
        copy_address = tl.load(row + 4)
        offs = (pid - tl.load(row + 6)) * BLOCK + tl.arange(0, BLOCK)  # int64
        size = tl.load(row + 5)
        if WHOLE_VECTORS:
            size = tl.multiple_of(size, 16)
        mask = offs < size

        grad = tl.load(grad_ptr + offs, mask=mask, other=0.0)
        m = tl.load(m_ptr + offs, mask=mask, other=0.0)
        v = tl.load(v_ptr + offs, mask=mask, other=0.0)
        master = tl.load(master_ptr + offs, mask=mask, other=0.0)
        m += lerp1 * (grad - m)
        v += lerp2 * (grad * grad - v)
        m_hat = tl.div_rn(m, tl.load(hyper_ptr + 1))
        v_hat = tl.div_rn(v, tl.load(hyper_ptr + 2))
        lr = tl.load(hyper_ptr)
        kept = master * (1 - lr * tl.load(hyper_ptr + 3))
        # Spelled out: left to the compiler, the rounding that is saved could be that of `kept`, and without decay the
        # bits would be others.
        master = tl.fma(-lr, tl.div_rn(m_hat, tl.sqrt_rn(v_hat) + eps), kept)
        tl.store(m_ptr + offs, m, mask=mask)
        tl.store(v_ptr + offs, v, mask=mask)
        tl.store(master_ptr + offs, master, mask=mask)
        if COPY_DTYPE is not None:
            copy_ptr = tl.multiple_of(copy_address.to(tl.pointer_type(COPY_DTYPE)), 16)
            tl.store(copy_ptr + offs, master.to(COPY_DTYPE), mask=mask & (copy_address != 0))




def _config() -> Tile:
    return {"BLOCK": 1024, "num_warps": 8}  # a vector of 16 bytes a thread and tensor


def _candidates() -> list[Tile]:
    return grid(lambda tile: 4 <= tile["BLOCK"] // (32 * tile["num_warps"]) <= 16, BLOCK=(512, 1024, 2048, 4096),
                num_warps=(2, 4, 8, 16))  # fmt: skip


ADAMW = Choice("adamw", [_adamw_kernel], lambda: _config(), _candidates)  # of whatever tensors
ALIGNMENT = 16  # bytes: what a vector load needs


@functools.cache
def _address_table(rows: tuple[tuple[int, ...], ...], block: int, device: torch.device) -> tuple[Tensor, int]:
    """The table on the device, and how many blocks of `block` elements there are in all. Kept for ever: a captured step
    may replay its address."""
    blocks, table = 0, []
    for *addresses, size in rows:
        table.append((*addresses, size, blocks))
        blocks += triton.cdiv(size, block)
    return torch.tensor(table, dtype=torch.int64, device=device), blocks


def _check(name: str, tensor: Tensor, like: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> int:
    """The address of `tensor`. Raises ValueError where the kernel cannot use it."""
    if tensor.shape != like.shape or tensor.dtype not in dtypes or not tensor.is_contiguous():
        kind = "contiguous" if tensor.is_contiguous() else "strided"
        raise ValueError(
            f"{name}: {kind} {tuple(tensor.shape)} {tensor.dtype}, expected contiguous {tuple(like.shape)} {dtypes[0]}"
        )
    address = tensor.data_ptr() if tensor.device.type != "meta" else 0
    if address % ALIGNMENT:
        raise ValueError(f"{name}: its address is no multiple of {ALIGNMENT} bytes")
    return address


_TL_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def _launch(
    masters: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    copies: list[Tensor | None],
    hyper: Tensor,
    apply: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    copy_dtypes = {copy.dtype for copy in copies if copy is not None}
    if len(copy_dtypes) > 1 or not copy_dtypes <= _TL_DTYPES.keys():
        raise ValueError(f"copies: {copy_dtypes}, expected one of {[*_TL_DTYPES]}")
    if hyper.dtype != torch.float32 or hyper.stride(0) != 1 or hyper.numel() < 4 or apply.dtype != torch.bool:
        raise ValueError(f"hyper: {hyper.dtype} {tuple(hyper.shape)}, apply: {apply.dtype}; expected fp32 [4], bool")
    rows = []
    for i, (master, grad, m, v, copy) in enumerate(
        zip(masters, grads, exp_avgs, exp_avg_sqs, copies, strict=True)
    ):
        named = {"masters": master, "grads": grad, "exp_avgs": m, "exp_avg_sqs": v}
        addresses = [_check(f"{name}[{i}]", tensor, master) for name, tensor in named.items()]
        addresses.append(0 if copy is None else _check(f"copies[{i}]", copy, master, tuple(copy_dtypes)))
        rows.append((*addresses, master.numel()))
    tile = ADAMW()
    table, blocks = _address_table(tuple(rows), tile["BLOCK"], masters[0].device)
    copy_dtype = getattr(tl, _TL_DTYPES[copy_dtypes.pop()]) if copy_dtypes else None
    _adamw_kernel[(blocks,)](
        table, hyper, apply, len(rows), 1 - betas[0], 1 - betas[1], eps,
        COPY_DTYPE=copy_dtype, WHOLE_VECTORS=all(row[-1] % 16 == 0 for row in rows),
        MAX_TENSORS=triton.next_power_of_2(len(rows)), **tile,
    )  # fmt: skip


def adamw_update(
    masters: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    copies: list[Tensor | None],
    hyper: Tensor,
    apply: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One step, in place, for every tensor of a group.

    Args:
        masters, grads, exp_avgs, exp_avg_sqs: lists of fp32 tensors, alike in shape position by position. The
            kernel needs them contiguous, at multiples of 16 bytes, and where they are from the first call on.
        copies: the bf16 tensors that the forward reads, or None where it reads the master.
        hyper: [≥ 4] fp32 on the device: learning rate, 1 − β₁ᵗ, 1 − β₂ᵗ, weight decay.
        apply: scalar boolean on the device; where it is false nothing changes.
        betas, eps: constants of the group.

    Raises:
        ValueError: shapes, dtypes, strides or addresses that the kernel does not take.
    """
    plain = adamw_update_cpu if use_cpu_forms() else adamw_update_ref
    update = _launch if use_kernels(masters[0]) else plain
    update(masters, grads, exp_avgs, exp_avg_sqs, copies, hyper, apply, betas, eps)


def cost(elements: int, copy_itemsize: int = 2) -> tuple[int, int]:
    """Bytes that have to move and FLOPs; `copy_itemsize` is 0 where the forward reads the masters."""
    return elements * (7 * 4 + copy_itemsize), elements * 14
