"""Muon with NorMuon's variance reduction and cautious decay, for a batch of matrices of one shape.

    M ← μM + (1−μ)G;  g = (1−μ)G + μM;  g ← polar_express(g)
    v = mean of g² along each row (rows ≥ cols) or each column;  V ← β₂V + (1−β₂)v;  s = max(V, 1e-10)^−½
    g ← g·s·(‖g‖_F / ‖g·s‖_F)
    W ← W − lr·g − lr·wd·W·[g·W ≥ 0]

Master, G, M: [batch, rows, cols] fp32, the batch and row strides free. Four kernels around `polar_express`: momentum
and Nesterov; v, V and s; the ratio of the two norms, which v and s alone determine, as ‖g‖² = n·Σv and ‖g·s‖² = n·Σv·s²
for means of n numbers; the update, with the rounded copy.
Bytes per element without Polar Express: 30 with a bf16 copy (G and M read, M and g written; after it the orthogonal g
read twice in bf16, master read and written, copy written). FLOPs: about 18.
Sources: Muon, Jordan et al. 2024 (kellerjordan.github.io/posts/muon); NorMuon, Li et al., arXiv 2510.05491; cautious
decay, Chen et al., arXiv 2510.12402.
"""

import torch
from torch import Tensor

from .choice import Choice, Tile, elements, fitting_block, fitting_blocks, grid
from .common import tl, triton, use_cpu_forms, use_kernels
from .cpu import muon_update_cpu
from .polar_express import polar_express, polar_express_ref

BETA2 = 0.95
# Columns of a row of hyperparameters (fp32, on the device: a captured step reads them anew at every replay).
LR, MOMENTUM, WEIGHT_DECAY = 0, 1, 2


def second_moment_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of V for matrices [..., rows, cols]: one number a row where rows ≥ cols, else one a column."""
    *batch, rows, cols = shape
    return (*batch, rows, 1) if rows >= cols else (*batch, 1, cols)


@torch.no_grad()
def muon_update_ref(
    master: Tensor,
    grad: Tensor,
    momentum: Tensor,
    second_moment: Tensor,
    copy: Tensor | None,
    hyper: Tensor,
    apply: Tensor,
    iterate_dtype: torch.dtype = torch.bfloat16,
) -> None:
    lr, mu, weight_decay = hyper[LR], hyper[MOMENTUM], hyper[WEIGHT_DECAY]
    new_momentum = momentum.lerp(grad, 1 - mu)
    g = polar_express_ref(grad.lerp(new_momentum, mu), iterate_dtype).to(master.dtype)

    along = -1 if master.shape[-2] >= master.shape[-1] else -2
    v = g.square().mean(along, keepdim=True)
    new_second_moment = second_moment.lerp(v, 1 - BETA2)
    scaled = g * new_second_moment.clamp_min(1e-10).rsqrt()
    matrix = (-2, -1)
    g = scaled * (g.norm(dim=matrix, keepdim=True) / scaled.norm(dim=matrix, keepdim=True).clamp_min(1e-10))

    new_master = master - lr * g - lr * weight_decay * master * (g * master >= 0)
    for old, new in ((momentum, new_momentum), (second_moment, new_second_moment), (master, new_master)):
        old.copy_(torch.where(apply, new, old))
    if copy is not None:
        copy.copy_(master)


@triton.jit
def _momentum_kernel(
    grad_ptr, momentum_ptr, out_ptr, hyper_ptr, apply_ptr,
    grad_stride_b, grad_stride_r, momentum_stride_b, momentum_stride_r, R, C,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out [batch, R, C] is Nesterov's gradient, momentum the new one."""
    batch = tl.program_id(2).to(tl.int64)
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mask = (offs_r < R) & (offs_c < C)
    mu = tl.load(hyper_ptr + 1)
    grad = tl.load(grad_ptr + batch * grad_stride_b + offs_r * grad_stride_r + offs_c, mask=mask, other=0.0)
    momentum_ptrs = momentum_ptr + batch * momentum_stride_b + offs_r * momentum_stride_r + offs_c
    momentum = tl.load(momentum_ptrs, mask=mask, other=0.0)
    momentum += (1 - mu) * (grad - momentum)
    tl.store(momentum_ptrs, momentum, mask=mask & tl.load(apply_ptr))
    tl.store(out_ptr + batch * R * C + offs_r * C + offs_c, momentum + (1 - mu) * (grad - momentum), mask=mask)


@triton.jit
def _variance_kernel(
    g_ptr, second_moment_ptr, v_ptr, scale_ptr, apply_ptr, g_stride_b, g_stride_l, g_stride_n, L, N,
    lerp, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """v [batch, L]: means of g² over N; scale = max(V, 1e-10)^−½ with the new V, which replaces the old."""
    batch = tl.program_id(1).to(tl.int64)
    offs_l = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    mask_l = offs_l < L
    acc = tl.zeros([BLOCK_L, BLOCK_N], dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        ptrs = g_ptr + batch * g_stride_b + offs_l[:, None] * g_stride_l + offs_n[None, :] * g_stride_n
        g = tl.load(ptrs, mask=mask_l[:, None] & (offs_n < N)[None, :], other=0.0).to(tl.float32)
        acc += g * g
    v = tl.sum(acc, axis=1) / N
    offs = batch * L + offs_l
    second_moment = tl.load(second_moment_ptr + offs, mask=mask_l, other=0.0)
    second_moment += lerp * (v - second_moment)
    tl.store(second_moment_ptr + offs, second_moment, mask=mask_l & tl.load(apply_ptr))
    tl.store(v_ptr + offs, v, mask=mask_l)
    tl.store(scale_ptr + offs, 1.0 / tl.sqrt_rn(tl.maximum(second_moment, 1e-10)), mask=mask_l)


@triton.jit
def _norm_ratio_kernel(v_ptr, scale_ptr, ratio_ptr, L, N, BLOCK: tl.constexpr):
    """ratio [batch] = ‖g‖ / ‖g·s‖."""
    batch = tl.program_id(0).to(tl.int64)
    before = tl.zeros([BLOCK], dtype=tl.float32)
    after = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, L, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        v = tl.load(v_ptr + batch * L + offs, mask=offs < L, other=0.0)
        scale = tl.load(scale_ptr + batch * L + offs, mask=offs < L, other=0.0)
        before += v
        after += v * scale * scale
    norm = tl.sqrt_rn(tl.sum(before) * N)
    tl.store(ratio_ptr + batch, norm / tl.maximum(tl.sqrt_rn(tl.sum(after) * N), 1e-10))


@triton.jit
def _muon_kernel(
    g_ptr, scale_ptr, ratio_ptr, master_ptr, copy_ptr, hyper_ptr, apply_ptr,
    master_stride_b, master_stride_r, copy_stride_b, copy_stride_r, R, C,
    BY_ROW: tl.constexpr, HAS_COPY: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The scaled update, cautious decay, and the copy."""
    if tl.load(apply_ptr):
        batch = tl.program_id(2).to(tl.int64)
        offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
        mask = (offs_r < R) & (offs_c < C)
        lr = tl.load(hyper_ptr)
        decay = lr * tl.load(hyper_ptr + 2)
        if BY_ROW:
            scale = tl.load(scale_ptr + batch * R + offs_r, mask=offs_r < R, other=0.0)
        else:
            scale = tl.load(scale_ptr + batch * C + offs_c, mask=offs_c < C, other=0.0)
        g = tl.load(g_ptr + batch * R * C + offs_r * C + offs_c, mask=mask, other=0.0).to(tl.float32)
        g = g * scale * tl.load(ratio_ptr + batch)
        master_ptrs = master_ptr + batch * master_stride_b + offs_r * master_stride_r + offs_c
        master = tl.load(master_ptrs, mask=mask, other=0.0)
        master = master - lr * g - tl.where(g * master >= 0, decay * master, 0.0)
        tl.store(master_ptrs, master, mask=mask)
        if HAS_COPY:
            copy_ptrs = copy_ptr + batch * copy_stride_b + offs_r * copy_stride_r + offs_c
            tl.store(copy_ptrs, master.to(copy_ptr.dtype.element_ty), mask=mask)


def _config(rows: int, cols: int) -> tuple[Tile, Tile]:
    """Tiles of the elementwise kernels and of the means: 2,048 elements for four warps, wide along the columns."""
    block_c = fitting_block(cols, 512)
    tile = {"BLOCK_R": max(1, 2048 // block_c), "BLOCK_C": block_c, "num_warps": 4}
    if rows >= cols:
        return tile, {"BLOCK_L": max(1, 2048 // block_c), "BLOCK_N": block_c, "num_warps": 4}
    return tile, {"BLOCK_L": 64, "BLOCK_N": 32, "num_warps": 4}


LARGE = 2**14  # elements of a matrix: a smaller one takes no time that a tile could change


def _candidates(rows: int, cols: int) -> list[Tile]:
    if rows * cols < LARGE:
        return []
    return grid(
        elements(lambda tile: tile["BLOCK_R"] * tile["BLOCK_C"], 8, 32), BLOCK_R=(2, 4, 8, 16),
        BLOCK_C=fitting_blocks(cols, (128, 256, 512)), num_warps=(4, 8),
    )  # fmt: skip


def _means_candidates(rows: int, cols: int) -> list[Tile]:
    if rows * cols < LARGE:
        return []
    if rows < cols:  # along the other side, where a tile has to be long the other way
        return grid(elements(lambda tile: tile["BLOCK_L"] * tile["BLOCK_N"], 8, 32), BLOCK_L=(32, 64, 128),
                    BLOCK_N=(16, 32, 64), num_warps=(2, 4, 8))  # fmt: skip
    return grid(
        elements(lambda tile: tile["BLOCK_L"] * tile["BLOCK_N"], 8, 32), BLOCK_L=(2, 4, 8, 16),
        BLOCK_N=fitting_blocks(cols, (128, 256, 512)), num_warps=(2, 4, 8),
    )  # fmt: skip


# (rows, columns) of a matrix, however many there are.
ELEMENTS = Choice("muon", [_momentum_kernel, _muon_kernel], lambda rows, cols: _config(rows, cols)[0], _candidates)
MEANS = Choice("muon-means", [_variance_kernel], lambda rows, cols: _config(rows, cols)[1], _means_candidates)


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.shape != shape or tensor.dtype not in dtypes or (tensor.stride(-1) != 1 and tensor.shape[-1] != 1):
        raise ValueError(
            f"{name}: {tuple(tensor.shape)} {tensor.dtype}, stride {tensor.stride(-1)} along the last dimension;"
            f" expected {tuple(shape)} {dtypes[0]}, stride 1"
        )


def _launch(
    master: Tensor,
    grad: Tensor,
    momentum: Tensor,
    second_moment: Tensor,
    copy: Tensor | None,
    hyper: Tensor,
    apply: Tensor,
    iterate_dtype: torch.dtype = torch.bfloat16,
) -> None:
    if master.ndim != 3:
        raise ValueError(f"master: {tuple(master.shape)}, expected [batch, rows, cols]")
    for name, tensor in (("master", master), ("grad", grad), ("momentum", momentum)):
        _check(name, tensor, master.shape, (torch.float32,))
    if copy is not None:
        _check("copy", copy, master.shape, (torch.bfloat16, torch.float16, torch.float32))
    if second_moment.shape != second_moment_shape(master.shape) or not second_moment.is_contiguous():
        raise ValueError(f"second_moment: {tuple(second_moment.shape)}, expected {second_moment_shape(master.shape)}")
    if hyper.dtype != torch.float32 or hyper.stride(0) != 1 or hyper.numel() < 3 or apply.dtype != torch.bool:
        raise ValueError(f"hyper: {hyper.dtype} {tuple(hyper.shape)}, apply: {apply.dtype}; expected fp32 [3], bool")

    batch, rows, cols = master.shape
    tile, means = ELEMENTS(rows, cols), MEANS(rows, cols)
    grid = (triton.cdiv(rows, tile["BLOCK_R"]), triton.cdiv(cols, tile["BLOCK_C"]), batch)
    g = torch.empty(batch, rows, cols, dtype=torch.float32, device=master.device)
    _momentum_kernel[grid](
        grad, momentum, g, hyper, apply,
        grad.stride(0), grad.stride(1), momentum.stride(0), momentum.stride(1), rows, cols, **tile,
    )  # fmt: skip
    g = polar_express(g, iterate_dtype)

    by_row = rows >= cols
    L, N = (rows, cols) if by_row else (cols, rows)
    v, scale = (torch.empty(batch, L, dtype=torch.float32, device=master.device) for _ in range(2))
    ratio = torch.empty(batch, dtype=torch.float32, device=master.device)
    strides = (cols, 1) if by_row else (1, cols)
    _variance_kernel[(triton.cdiv(L, means["BLOCK_L"]), batch)](
        g, second_moment, v, scale, apply, rows * cols, *strides, L, N, 1 - BETA2, **means
    )
    _norm_ratio_kernel[(batch,)](v, scale, ratio, L, N, BLOCK=1024, num_warps=4)
    _muon_kernel[grid](
        g, scale, ratio, master, copy, hyper, apply,
        master.stride(0), master.stride(1), *((0, 0) if copy is None else copy.stride()[:2]), rows, cols,
        BY_ROW=by_row, HAS_COPY=copy is not None, **tile,
    )  # fmt: skip


def muon_update(
    master: Tensor,
    grad: Tensor,
    momentum: Tensor,
    second_moment: Tensor,
    copy: Tensor | None,
    hyper: Tensor,
    apply: Tensor,
    iterate_dtype: torch.dtype = torch.bfloat16,
) -> None:
    """One step, in place, for `batch` matrices.

    Args:
        master, grad, momentum: [batch, rows, cols], fp32; views with any batch and row stride.
        second_moment: `second_moment_shape(master.shape)`, fp32.
        copy: the bf16 tensor that the forward reads, shaped like `master`, or None where it reads the master.
        hyper: [≥ 3] fp32 on the device: learning rate, momentum, weight decay.
        apply: scalar boolean on the device; where it is false nothing changes.
        iterate_dtype: of the products of `polar_express`.

    Raises:
        ValueError: shapes, dtypes or strides that the kernels do not take.
    """
    if use_cpu_forms():
        muon_update_cpu(master, grad, momentum, second_moment, copy, hyper, apply, iterate_dtype, BETA2)
        return
    update = _launch if use_kernels(master) else muon_update_ref
    update(master, grad, momentum, second_moment, copy, hyper, apply, iterate_dtype)


def cost(elements: int, copy_itemsize: int = 2) -> tuple[int, int]:
    """Bytes that have to move and FLOPs, of all but Polar Express; its input and output are in."""
    return elements * (4 * 4 + 2 * 2 + 2 * 4 + copy_itemsize), elements * 18
