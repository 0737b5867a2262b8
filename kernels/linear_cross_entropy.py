"""The head and its loss, in one: z = x·Wᵀ, logits = c·tanh(z/c), loss = logsumexp(logits) − logits[target].

x: [N, D]; W: [V, D]; targets: [N], −1 for a token that counts nowhere. The softcap c keeps every logit within ±c: the
sum of exponentials can neither overflow nor vanish, and needs no running maximum. Softmax and loss are fp32.

    dz = (softmax − onehot(target))·(1 − tanh²(z/c)) / count;  dx = dz·W;  dW = dzᵀ·x

The rows are taken in chunks, and for "mean" the forward also takes the gradients, since it has the logits at hand: one
kernel reads a chunk of z, writes its losses and puts count·dz where z was. So z of more than one chunk never exists.
The chunk is in the dtype of x: PyTorch's own linear rounds z in the same way, and fp32 would double the bytes. Backward
scales by dloss / count, which is known only then.

Saved: dx and dW (fp32), before scaling. Bytes per token in 16 bits: 10V + 6D, and 4D for the scaling. FLOPs per token:
6DV. Source of the softcap: Gemma 2, arXiv 2408.00118.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .choice import Choice, Tile, elements, grid
from .common import device_type, tl, triton, upcast, use_cpu_forms, use_kernels
from .cpu import linear_cross_entropy_cpu, token_losses_cpu
from .product import product
from .weight_grad import weight_grad

SOFTCAP = 15.0
IGNORED = -1  # a target that contributes neither loss nor gradient, and is not counted in the mean
MAX_SOFTCAP = 64.0  # V·e^c stays finite in fp32


def softcapped_logits(x: Tensor, weight: Tensor, softcap: float = SOFTCAP) -> Tensor:
    """x: [..., D]; weight: [V, D]. Returns [..., V] in fp32 or wider: for sampling, where one row is wanted."""
    if use_cpu_forms():
        x = x.to(weight.dtype)
    return softcap * torch.tanh(upcast(F.linear(x, weight)) / softcap)


def linear_cross_entropy_ref(
    x: Tensor, weight: Tensor, targets: Tensor, softcap: float = SOFTCAP, reduction: str = "mean"
) -> Tensor:
    logits = softcapped_logits(x, weight, softcap)
    return F.cross_entropy(logits, targets.long(), ignore_index=IGNORED, reduction=reduction)


@triton.jit
def _softcap_exp(z, softcap):
    """tanh(z / c) and e^(c·tanh(z / c)), of any size of z: where e^(2z/c) is infinite, tanh is 1."""
    # By exp2: exp guards against results that are too small for fp32, and takes four more instructions each time.
    LOG2_E: tl.constexpr = 1.4426950408889634
    tanh = 1.0 - 2.0 / (1.0 + tl.exp2(z * (2.0 * LOG2_E / softcap)))
    return tanh, tl.exp2((softcap * LOG2_E) * tanh)


@triton.jit
def _dlogits(tanh, exp, offs, target, inverse_sum):
    """(softmax − onehot)·(1 − tanh²); `inverse_sum` is 0 and `target` no column where the row does not count."""
    return (exp * inverse_sum - tl.where(offs == target, 1.0, 0.0)) * (1.0 - tanh * tanh)


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, targets_ptr, losses_ptr, logits_stride_m, softcap,
    V: tl.constexpr, IGNORED: tl.constexpr, HAS_GRAD: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One row: its loss, and with HAS_GRAD count·dz in place of z. A row of one block is read once and kept."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride_m
    target = tl.load(targets_ptr + row)
    counts = target != IGNORED
    # Any other target outside the vocabulary makes the loss NaN, which the trainer reports.
    z_target = tl.load(logits_ptr + target, mask=(target >= 0) & (target < V), other=float("nan")).to(tl.float32)
    offs = tl.arange(0, BLOCK_V)
    if ONE_BLOCK:
        z = tl.load(logits_ptr + offs, mask=offs < V, other=0.0).to(tl.float32)
        tanh, exp = _softcap_exp(z, softcap)
        total = tl.sum(tl.where(offs < V, exp, 0.0))
    else:
        sums = tl.zeros([BLOCK_V], dtype=tl.float32)
        for start in range(0, V, BLOCK_V):
            mask = offs < V - start
            z = tl.load(logits_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
            tanh, exp = _softcap_exp(z, softcap)
            sums += tl.where(mask, exp, 0.0)
        total = tl.sum(sums)
    tanh_target, _ = _softcap_exp(z_target, softcap)
    tl.store(losses_ptr + row, tl.where(counts, tl.log(total) - softcap * tanh_target, 0.0))
    if HAS_GRAD:
        tl.debug_barrier()  # every thread has read the target's logit before any overwrites it
        inverse_sum = tl.where(counts, 1.0 / total, 0.0)
        if ONE_BLOCK:
            dz = _dlogits(tanh, exp, offs, target, inverse_sum)
            tl.store(logits_ptr + offs, dz.to(logits_ptr.dtype.element_ty), mask=offs < V)
        else:
            for start in range(0, V, BLOCK_V):
                mask = offs < V - start
                z = tl.load(logits_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
                tanh, exp = _softcap_exp(z, softcap)
                dz = _dlogits(tanh, exp, start + offs, target, inverse_sum)
                tl.store(logits_ptr + start + offs, dz.to(logits_ptr.dtype.element_ty), mask=mask)


def _config(V: int) -> Tile:
    """A row of up to 16,384 is one block, whose tanh and exponentials stay in registers, 32 of each a thread; 64 would
    spill, so a longer row is read twice, the second time from the caches. Not yet measured."""
    block_v = triton.next_power_of_2(V)
    if block_v > 16384:
        return {"ONE_BLOCK": False, "BLOCK_V": 4096, "num_warps": 8}
    return {"ONE_BLOCK": True, "BLOCK_V": block_v, "num_warps": max(4, min(16, block_v // 1024))}


def _candidates(V: int, dtype: torch.dtype) -> list[Tile]:
    whole = triton.next_power_of_2(V)
    blocks = [block for block in (1024, 2048, 4096, 8192) if block < whole]
    return [
        *({"ONE_BLOCK": True, "BLOCK_V": whole, "num_warps": warps} for warps in (4, 8, 16, 32)),
        *grid(elements(lambda tile: tile["BLOCK_V"], 4, 32), ONE_BLOCK=(False,), BLOCK_V=blocks, num_warps=(4, 8, 16)),
    ]


SOFTMAX = Choice("softmax", [_cross_entropy_kernel], lambda V, dtype: _config(V), _candidates)
# Logits that are there at once, on a GPU: 2²⁴ may stay in the L2 from the product to the softmax and the next product.
# More of them are fewer and larger products.
CHUNK = Choice(
    "loss-chunk", [], lambda V, dtype: {"logits": 2**28},
    lambda V, dtype: [{"logits": 2**n} for n in (23, 24, 25, 26)],
)


def _cross_entropy(logits: Tensor, targets: Tensor, losses: Tensor, softcap: float, has_grad: bool) -> None:
    """Writes the losses of [rows, V] products z, and with `has_grad` their unscaled gradient in place of them."""
    rows, V = logits.shape
    _cross_entropy_kernel[(rows,)](
        logits, targets, losses, logits.stride(0), softcap,
        V=V, IGNORED=IGNORED, HAS_GRAD=has_grad, **SOFTMAX(V, logits.dtype),
    )


def _chunk_rows(vocab_size: int, x: Tensor) -> int:
    # On a CPU a chunk of fp32 logits should stay in the last-level cache: 4 MiB is 3 times as fast as all rows at once
    # (bench/LOG.md, 2026-11-23). On a GPU it has to be large enough to fill the device.
    logits = 2**20 if device_type(x) == "cpu" else CHUNK(vocab_size, x.dtype)["logits"]
    return max(64, logits // vocab_size)


def _chunked_losses(
    x: Tensor, weight: Tensor, targets: Tensor, softcap: float, dx: Tensor | None = None, dweight: Tensor | None = None
) -> Tensor:
    """The losses [N] by the kernel. Where they are given, `dx` receives count·dx and `dweight` has count·dW added."""
    (N, _), V = x.shape, weight.shape[0]
    losses = torch.empty(N, dtype=torch.float32, device=x.device)
    rows = max(1, min(N, _chunk_rows(V, x)))
    aligned = triton.cdiv(V, 64) * 64  # every row starts at a multiple of 128 bytes, for the GEMMs and the kernel
    buffer = torch.empty(rows, aligned, dtype=x.dtype, device=x.device)
    has_grad = dx is not None or dweight is not None
    for start in range(0, N, rows):
        part = slice(start, min(start + rows, N))
        chunk = buffer[: part.stop - start, :V]
        product(x[part], weight.mT, out=chunk)
        _cross_entropy(chunk, targets[part], losses[part], softcap, has_grad)
        if dx is not None:
            product(chunk, weight, out=dx[part])
        if dweight is not None:
            weight_grad(chunk, x[part], dweight)
    return losses


def _check(x: Tensor, weight: Tensor, targets: Tensor, softcap: float) -> None:
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16) or weight.dtype != x.dtype:
        raise ValueError(f"x {x.dtype}, weight {weight.dtype}: the kernels take one of float32, float16 and bfloat16")
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)}: expected [N, D] and [V, D]")
    if targets.shape != x.shape[:1] or targets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"targets: {tuple(targets.shape)} {targets.dtype}, expected [{x.shape[0]}] int32 or int64")
    _check_softcap(softcap)


def _check_softcap(softcap: float) -> None:
    if not 0 < softcap <= MAX_SOFTCAP:
        raise ValueError(f"softcap {softcap} must be above 0 and at most {MAX_SOFTCAP:g}")


def _count(targets: Tensor) -> Tensor:
    return (targets != IGNORED).sum()  # on the device: nothing waits for it


class _LinearCrossEntropy(torch.autograd.Function):
    """The mean loss by the kernel. dW waits in fp32 for dloss, and is then added to `main_grad` in one pass."""

    @staticmethod
    def forward(ctx, x, weight, targets, softcap, main_grad):
        needs_dx, needs_dw, *_ = ctx.needs_input_grad
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs_dx else None
        dweight = torch.zeros(weight.shape, dtype=torch.float32, device=x.device) if needs_dw else None
        losses = _chunked_losses(x, weight, targets, softcap, dx, dweight)
        count = _count(targets)
        ctx.save_for_backward(dx, dweight, count)
        ctx.main_grad, ctx.dtype = main_grad, weight.dtype
        return losses.sum() / count

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        dx, dweight, count = ctx.saved_tensors
        scale = dloss / count
        if dx is not None:
            dx = dx * scale
        if dweight is not None and ctx.main_grad is not None:
            ctx.main_grad.addcmul_(dweight, scale)
            dweight = None
        elif dweight is not None:
            dweight = (dweight * scale).to(ctx.dtype)
        return dx, dweight, None, None, None


class _ChunkedMean(torch.autograd.Function):
    """The mean loss, chunk by chunk. The reference's own autograd takes each chunk's gradient as soon as its loss is
    there, so logits of more than one chunk never exist. Saved for backward: dx [N, D] and dweight [V, D]."""

    @staticmethod
    def forward(ctx, x, weight, targets, softcap):
        weight = weight.detach().requires_grad_()
        dx = torch.empty_like(x)
        total = 0.0
        rows, count = _chunk_rows(weight.shape[0], x), _count(targets)
        for part, targets_part, dx_part in zip(x.split(rows), targets.split(rows), dx.split(rows), strict=True):
            with torch.enable_grad():
                part = part.detach().requires_grad_()
                loss = linear_cross_entropy_ref(part, weight, targets_part, softcap, "sum") / count
            loss.backward()
            dx_part.copy_(part.grad)
            total = total + loss.detach()
        ctx.save_for_backward(dx, weight.grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        dx, dweight = ctx.saved_tensors
        return dx * dloss, dweight * dloss, None, None


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, softcap: float = SOFTCAP, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy of a softcapped linear head, in nats.

    Args:
        x: [N, D]; weight: [V, D]. Where `weight` carries `main_grad`, the kernels add its gradient there.
        targets: [N], integers in [0, V), or −1 for a token that does not count.
        softcap: above 0; at most 64, but for the references.
        reduction: "mean" over the tokens that count, or "none" for one loss a token, 0 where it does not count. "none"
            is for evaluation: with gradients enabled the reference does it, and holds the logits of all rows.

    Returns:
        a scalar or [N], in fp32 (fp64 where the inputs are). A mean over no token at all is NaN, as PyTorch's is: the
        trainer then stops, and a batch without a single target does not pass for one that was learned from.

    Raises:
        ValueError: another reduction; shapes, dtypes or a softcap that the kernels do not take.
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction {reduction!r} must be 'mean' or 'none'")
    kernels = use_kernels(x)
    if kernels:
        _check(x, weight, targets, softcap)
        targets = targets.contiguous()
    elif use_cpu_forms():
        _check_softcap(softcap)
    if not kernels and torch.compiler.is_compiling():
        # As the published system compiles it: the chunks take gradients inside their forward, which cannot be traced.
        # The compiler fuses what follows the product, so of all rows only z is kept, and in the dtype of x.
        return linear_cross_entropy_ref(x, weight, targets, softcap, reduction)
    if torch.is_grad_enabled():
        if reduction == "none":
            return linear_cross_entropy_ref(x, weight, targets, softcap, reduction)
        if kernels:
            return _LinearCrossEntropy.apply(x, weight, targets, softcap, getattr(weight, "main_grad", None))
        if use_cpu_forms():
            return linear_cross_entropy_cpu(x, weight, targets, softcap, IGNORED)
        return _ChunkedMean.apply(x, weight, targets, softcap)
    if kernels:
        losses = _chunked_losses(x, weight, targets, softcap)
    elif use_cpu_forms():
        losses = token_losses_cpu(x, weight, targets, softcap, IGNORED)
    else:
        rows = _chunk_rows(weight.shape[0], x)
        parts = zip(x.split(rows), targets.split(rows), strict=True)
        losses = torch.cat([linear_cross_entropy_ref(part, weight, t, softcap, "none") for part, t in parts])
    return losses if reduction == "none" else losses.sum() / _count(targets)


def cost(rows: int, width: int, vocab: int, itemsize: int = 2, backward: bool = False) -> tuple[int, int]:
    """Bytes that have to move and FLOPs, for [rows, width] and [vocab, width]; chunks of logits go through memory.

    W and its fp32 gradient are counted once: how often they are read again depends on the chunks.
    """
    weight, product = width * vocab, 2 * rows * width * vocab
    if not backward:  # x, z written and read, W, the targets as int64, the losses
        return (rows * (width + 2 * vocab) + weight) * itemsize + rows * 12, product + 10 * rows * vocab
    # dz written, and read for dx and for dW; x; dx written, then read and written scaled; W; dW read and written
    return (rows * (4 * width + 3 * vocab) + weight) * itemsize + 8 * weight, 2 * product + 5 * rows * vocab
