"""RMSNorm without a weight, and before it the mix of the residual stream x with x₀, the stream's beginning.

    s = λᵣ·x + λ₀·x₀                       (without x₀: s = x)
    y = s / sqrt(mean(s²) + eps)           eps = 2⁻²³

A row stays in registers between the sum and what needs it: as one tile, or as parts side by side, of one shape and
added up before any thread asks another, so that a row of 640 need not be a tile of 1,024.

Both s and y are returned: a layer that read x beside y would leave autograd a sum of two gradients to make. x₀ is
returned too, for the next layer to read: its gradient then passes through this op, which adds it to the dx₀ that it
writes anyway.
x, x₀, s, y: [..., D]; λᵣ, λ₀: scalars. Source: Zhang & Sennrich, arXiv 1910.07467.

Backward, with x̂ = s·rstd:  g = ds + rstd·(dy − x̂·mean(dy·x̂));  dx = λᵣ·g;  dx₀ = λ₀·g + the gradient of the x₀ that was
returned;  dλᵣ = Σ g·x;  dλ₀ = Σ g·x₀, per block of rows first and then over the blocks, in a fixed order.

`norm_factors` does not write y = rstd ⊙ s: it returns the two factors, and the op that reads y multiplies by rstd in
its epilogue. The gradient that this product sends back for s is rstd ⊙ dy, and g = ds + rstd·dy − x̂·mean(rstd·dy·x̂)
needs no more.

Saved: rstd in fp32, and with x₀ the tensors that s is made of. Without x₀ there is no λ whose gradient needs them: y is
x̂, and what follows a norm mostly keeps y for itself, so that keeping it here too costs nothing. With x alone, s is x:
nothing is written.
Bytes per token at width D in 16 bits, x alone: 4D forward, 8D backward; with x₀: 8D and 14D. FLOPs: about 4D and 9D.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .choice import Choice, Tile, elements, grid
from .common import EPS, Factors, gpu_arch, tl, triton, upcast, use_cpu_forms, use_kernels
from .cpu import rms_norm_cpu


def rms_norm_ref(
    x: Tensor,
    x0: Tensor | None = None,
    lambda_r: Tensor | None = None,
    lambda_0: Tensor | None = None,
) -> tuple[Tensor, ...]:
    s = upcast(x)
    if x0 is not None:
        s = lambda_r * s + lambda_0 * upcast(x0)
    y = s * torch.rsqrt(s.square().mean(-1, keepdim=True) + EPS)
    return (s.to(x.dtype), y.to(x.dtype), *([] if x0 is None else [x0]))


@triton.jit
def _part(part: tl.constexpr, mask_m, D, BLOCK_D: tl.constexpr):
    """Columns [BLOCK_D] of one part of the rows, and which of its elements there are: [BM, BLOCK_D]."""
    offs_d = part * BLOCK_D + tl.arange(0, BLOCK_D)
    return offs_d, mask_m[:, None] & (offs_d < D)[None, :]


@triton.jit
def _load(ptrs, mask):
    return tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _products(a, b):
    """a·b, added up over the parts and not yet within them: [BM, BLOCK_D]."""
    products = a[0] * b[0]
    for part in tl.static_range(1, len(a)):
        products += a[part] * b[part]
    return products


@triton.jit
def _rms_norm_fwd_kernel(
    x_ptr, x0_ptr, lambda_r_ptr, lambda_0_ptr, s_ptr, y_ptr, rstd_ptr, x_stride_m, x0_stride_m, M, D,
    EPS: tl.constexpr, HAS_X0: tl.constexpr, HAS_S: tl.constexpr, HAS_Y: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    s = ()  # of every part one, as all tuples here
    for part in tl.static_range(PARTS):
        offs_d, mask = _part(part, mask_m, D, BLOCK_D)
        mixed = _load(x_ptr + offs_m[:, None] * x_stride_m + offs_d[None, :], mask)
        if HAS_X0:
            x0 = _load(x0_ptr + offs_m[:, None] * x0_stride_m + offs_d[None, :], mask)
            mixed = tl.load(lambda_r_ptr) * mixed + tl.load(lambda_0_ptr) * x0
        s += (mixed,)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(_products(s, s), axis=1) / D + EPS)  # [BM]
    for part in tl.static_range(PARTS):
        offs_d, mask = _part(part, mask_m, D, BLOCK_D)
        offs = offs_m[:, None] * D + offs_d[None, :]
        if HAS_S:
            tl.store(s_ptr + offs, s[part].to(s_ptr.dtype.element_ty), mask=mask)
        if HAS_Y:
            tl.store(y_ptr + offs, (s[part] * rstd[:, None]).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)


@triton.jit
def _rms_norm_bwd_kernel(
    ds_ptr, dy_ptr, dx0_later_ptr, x_ptr, x0_ptr, lambda_r_ptr, lambda_0_ptr, rstd_ptr,
    dx_ptr, dx0_ptr, partial_ptr, x_stride_m, x0_stride_m, M, D,
    HAS_DS: tl.constexpr, HAS_DY: tl.constexpr, SCALED: tl.constexpr, HAS_X0: tl.constexpr, HAS_LATER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Without HAS_X0, `x_ptr` is y. With SCALED, `dy_ptr` is rstd ⊙ dy."""
    pid = tl.program_id(0)
    dlambda_r = 0.0
    dlambda_0 = 0.0
    for step in range(STEPS):
        offs_m = (pid.to(tl.int64) * STEPS + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        x, x0, normed, dy, g = (), (), (), (), ()
        for part in tl.static_range(PARTS):
            offs_d, mask = _part(part, mask_m, D, BLOCK_D)
            offs = offs_m[:, None] * D + offs_d[None, :]
            x += (_load(x_ptr + offs_m[:, None] * x_stride_m + offs_d[None, :], mask),)
            if HAS_X0:
                x0 += (_load(x0_ptr + offs_m[:, None] * x0_stride_m + offs_d[None, :], mask),)
                s = tl.load(lambda_r_ptr) * x[part] + tl.load(lambda_0_ptr) * x0[part]
            if HAS_DY:
                rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
                scaled = _load(dy_ptr + offs, mask)
                normed += (s * rstd if HAS_X0 else x[part],)
                dy += (scaled if SCALED else rstd * scaled,)
        if HAS_DY:
            along = tl.sum(_products(dy, normed), axis=1)[:, None] / D
        for part in tl.static_range(PARTS):
            offs_d, mask = _part(part, mask_m, D, BLOCK_D)
            offs = offs_m[:, None] * D + offs_d[None, :]
            g_part = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
            if HAS_DY:
                g_part += dy[part] - normed[part] * along
            if HAS_DS:
                g_part += _load(ds_ptr + offs, mask)
            g += (g_part,)
        if HAS_X0:
            dlambda_r += tl.sum(_products(g, x))
            dlambda_0 += tl.sum(_products(g, x0))
        for part in tl.static_range(PARTS):
            offs_d, mask = _part(part, mask_m, D, BLOCK_D)
            offs = offs_m[:, None] * D + offs_d[None, :]
            if HAS_X0:
                tl.store(dx_ptr + offs, (tl.load(lambda_r_ptr) * g[part]).to(dx_ptr.dtype.element_ty), mask=mask)
                dx0 = tl.load(lambda_0_ptr) * g[part]
                if HAS_LATER:
                    dx0 += _load(dx0_later_ptr + offs, mask)
                tl.store(dx0_ptr + offs, dx0.to(dx0_ptr.dtype.element_ty), mask=mask)
            else:
                tl.store(dx_ptr + offs, g[part].to(dx_ptr.dtype.element_ty), mask=mask)
    if HAS_X0:
        tl.store(partial_ptr + 2 * pid, dlambda_r)
        tl.store(partial_ptr + 2 * pid + 1, dlambda_0)


@triton.jit
def _dlambda_kernel(
    partial_ptr, dlambda_r_ptr, dlambda_0_ptr, N,
    ACCUMULATE_R: tl.constexpr, ACCUMULATE_0: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums the [N, 2] partial gradients of λᵣ and λ₀: one program, always in the same order."""
    sum_r = tl.zeros([BLOCK], dtype=tl.float32)
    sum_0 = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, N, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        sum_r += tl.load(partial_ptr + 2 * offs, mask=offs < N, other=0.0)
        sum_0 += tl.load(partial_ptr + 2 * offs + 1, mask=offs < N, other=0.0)
    dlambda_r = tl.sum(sum_r)
    dlambda_0 = tl.sum(sum_0)
    if ACCUMULATE_R:
        dlambda_r += tl.load(dlambda_r_ptr)
    if ACCUMULATE_0:
        dlambda_0 += tl.load(dlambda_0_ptr)
    tl.store(dlambda_r_ptr, dlambda_r)
    tl.store(dlambda_0_ptr, dlambda_0)


MAX_WIDTH = 8192  # of a row, which registers hold
MIN_SPLIT = 64  # a row up to this wide is never in parts


def _config(D: int) -> Tile:
    """A tile holds whole rows: 2,048 elements for four warps, two vectors of 16 bytes a thread and 16-bit tensor.
    Half of that where rows are no whole vectors: every element then has an address in registers. Half too on sm_120
    where they need a mask: there the assembler takes 80 registers for the other, and spills.

    A row is one part as wide as the next power of two; or, where five eighths of that hold it, five parts, with twice
    the rows in as many warps: about half as many instructions a row, and more rows at once (bench/LOG.md)."""
    width = triton.next_power_of_2(D)
    masked_on_120 = width != D and gpu_arch() == 120
    block_m = max(1, (2048 if D % 8 == 0 and not masked_on_120 else 1024) // width)
    num_warps = max(4, min(16, block_m * width // 512))
    five_eighths = 5 * width // 8
    if width > MIN_SPLIT and five_eighths >= D:
        return {"BLOCK_M": 2 * block_m, "BLOCK_D": width // 8, "num_warps": num_warps}
    return {"BLOCK_M": block_m, "BLOCK_D": width, "num_warps": num_warps}


# Blocks of rows that a program of the backward walks: what divides the number of partial sums of the λ gradients.
STEPS = 8


def _widths(D: int) -> tuple[int, ...]:
    """Of a row's parts: all of it in one, and unless that fits also an eighth, of which it has five to eight."""
    width = triton.next_power_of_2(D)
    return (width,) if width == D or width <= MIN_SPLIT else (width, width // 8)


def _tiles(D: int, least: int, most: int, blocks_m: tuple[int, ...]) -> list[Tile]:
    return grid(
        elements(lambda tile: tile["BLOCK_M"] * triton.cdiv(D, tile["BLOCK_D"]) * tile["BLOCK_D"], least, most),
        BLOCK_M=blocks_m, BLOCK_D=_widths(D), num_warps=(1, 2, 4, 8),
    )  # fmt: skip


def _candidates(D: int, dtype: torch.dtype) -> list[Tile]:
    return _tiles(D, 4, 64 if len(_widths(D)) == 1 else 32, (1, 2, 4, 8, 16))


def _backward_candidates(D: int, dtype: torch.dtype) -> list[Tile]:
    all_steps = (4, 8, 16) if len(_widths(D)) == 1 else (8, 16)
    return [{**tile, "STEPS": steps} for tile in _tiles(D, 8, 32, (1, 2, 4, 8)) for steps in all_steps]


# Of rows of D: (D, dtype). With x0 and without it is another kernel, which moves other bytes.
FORWARD = {
    mixed: Choice(name, [_rms_norm_fwd_kernel], lambda D, dtype: _config(D), _candidates)
    for mixed, name in ((False, "norm-forward"), (True, "mix-and-norm-forward"))
}
BACKWARD = {
    mixed: Choice(name, [_rms_norm_bwd_kernel], lambda D, dtype: {**_config(D), "STEPS": STEPS}, _backward_candidates)
    for mixed, name in ((False, "norm-backward"), (True, "mix-and-norm-backward"))
}


def _rows(name: str, tensor: Tensor | None, like: Tensor) -> Tensor | None:
    """[..., D] as [M, D] with unit stride along D. Raises ValueError for what the kernels cannot read."""
    if tensor is None:
        return None
    if tensor.shape != like.shape or tensor.dtype != like.dtype:
        raise ValueError(f"{name}: {tuple(tensor.shape)} {tensor.dtype}, x has {tuple(like.shape)} {like.dtype}")
    if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
        raise ValueError(f"{name}: stride {tensor.stride(-1)} along the last dimension, the kernels need 1")
    return tensor.reshape(-1, tensor.shape[-1])


def _check(x: Tensor, x0: Tensor | None, lambdas: tuple[Tensor | None, Tensor | None]) -> None:
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"x: {x.dtype}, the kernels take float32, float16 and bfloat16")
    if not 1 <= x.shape[-1] <= MAX_WIDTH:
        raise ValueError(f"x: width {x.shape[-1]}, the kernels take 1 to {MAX_WIDTH}")
    for name, value in zip(("lambda_r", "lambda_0"), lambdas, strict=True):
        if (value is None) != (x0 is None):
            raise ValueError(f"{name} is given exactly when x0 is")
        if value is not None and (value.numel() != 1 or value.dtype != torch.float32):
            raise ValueError(f"{name}: {tuple(value.shape)} {value.dtype}, expected one float32")


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, x0, lambda_r, lambda_0, dlambda_r, dlambda_0, wanted):
        # wanted: "s, y"; "y" alone; "factors" of y, that is s twice and rstd
        _check(x, x0, (lambda_r, lambda_0))
        ctx.set_materialize_grads(False)
        rows, rows_x0 = _rows("x", x, x), _rows("x0", x0, x)
        M, D = rows.shape
        mixed = x0 is not None
        y = None if wanted == "factors" else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        s = None if wanted == "y" else torch.empty(x.shape, dtype=x.dtype, device=x.device) if mixed else x
        rstd = torch.empty(M, dtype=torch.float32, device=x.device)
        config = FORWARD[mixed](D, x.dtype)
        _rms_norm_fwd_kernel[(triton.cdiv(M, config["BLOCK_M"]),)](
            rows, rows_x0, lambda_r, lambda_0, s, y, rstd, rows.stride(0), rows_x0.stride(0) if mixed else 0, M, D,
            EPS=EPS, HAS_X0=mixed, HAS_S=mixed and wanted != "y", HAS_Y=wanted != "factors",
            **{"PARTS": triton.cdiv(D, config["BLOCK_D"])} | config,
        )  # fmt: skip
        # An output is saved as it is: a view of it would keep it, and with it this node, alive for ever.
        ctx.save_for_backward(rows if mixed else y, rows_x0, lambda_r, lambda_0, rstd)
        ctx.scaled = wanted == "factors"
        ctx.dlambda = dlambda_r, dlambda_0
        if wanted == "factors":
            rstd = rstd.view(x.shape[:-1])
            ctx.mark_non_differentiable(rstd)
            return s, s.view_as(s), rstd, x0
        return (s, y, x0) if mixed else (s, y)

    @staticmethod
    @once_differentiable
    def backward(ctx, ds, dy, *others):
        dx0_later = others[-1] if others else None
        x, x0, lambda_r, lambda_0, rstd = ctx.saved_tensors
        if ds is None and dy is None:
            return None, dx0_later, *(None,) * 5
        shape = (dy if ds is None else ds).shape
        ds, dy, dx0_later = (None if g is None else g.contiguous() for g in (ds, dy, dx0_later))
        x = x.reshape(-1, shape[-1])
        M, D = x.shape
        config = BACKWARD[x0 is not None](D, x.dtype)
        programs = triton.cdiv(M, config["BLOCK_M"] * config["STEPS"])
        dx = torch.empty(shape, dtype=x.dtype, device=x.device)
        dx0 = None if x0 is None else torch.empty_like(dx)
        partial = None if x0 is None else torch.empty(programs, 2, dtype=torch.float32, device=x.device)
        _rms_norm_bwd_kernel[(programs,)](
            ds, dy, dx0_later, x, x0, lambda_r, lambda_0, rstd, dx, dx0, partial,
            x.stride(0), 0 if x0 is None else x0.stride(0), M, D,
            HAS_DS=ds is not None, HAS_DY=dy is not None, SCALED=ctx.scaled,
            HAS_X0=x0 is not None, HAS_LATER=dx0_later is not None,
            **{"PARTS": triton.cdiv(D, config["BLOCK_D"])} | config,
        )  # fmt: skip
        if x0 is None:
            return dx, *(None,) * 6
        main_grads = [g if needed else None for g, needed in zip(ctx.dlambda, ctx.needs_input_grad[2:4], strict=True)]
        targets = [
            torch.empty(like.shape, dtype=torch.float32, device=x.device) if main_grad is None else main_grad
            for like, main_grad in zip((lambda_r, lambda_0), main_grads, strict=True)
        ]
        _dlambda_kernel[(1,)](
            partial, *targets, programs,
            ACCUMULATE_R=main_grads[0] is not None, ACCUMULATE_0=main_grads[1] is not None, BLOCK=1024, num_warps=8,
        )  # fmt: skip
        dlambda_r, dlambda_0 = (
            target if main_grad is None else None for target, main_grad in zip(targets, main_grads, strict=True)
        )
        return dx, dx0, dlambda_r, dlambda_0, None, None, None


def rms_norm(
    x: Tensor,
    x0: Tensor | None = None,
    lambda_r: Tensor | None = None,
    lambda_0: Tensor | None = None,
    y_only: bool = False,
) -> tuple[Tensor | None, ...]:
    """The mixed stream, its norm, and x0 for the next layer.

    Args:
        x, x0: [..., D], one dtype.
        lambda_r, lambda_0: 0-dimensional, fp32 or wider; given exactly when `x0` is. Where one carries `main_grad`,
            the kernels add its gradient there.
        y_only: s is not wanted, and the kernels do not write it.

    Returns:
        (s, y), and with `x0` also a view of it: the gradient of what reads that view comes through here, and is added
        to dx0. All shaped and typed like `x`. Without `x0`, s is a view of `x`; with `y_only` it is None.

    Raises:
        ValueError: shapes, dtypes or strides that the kernels do not take.
    """
    if not use_kernels(x):
        norm = rms_norm_cpu if use_cpu_forms() else rms_norm_ref
        s, *rest = norm(x, x0, lambda_r, lambda_0)
        return None if y_only else s, *rest
    dlambda_r, dlambda_0 = getattr(lambda_r, "main_grad", None), getattr(lambda_0, "main_grad", None)
    return _RMSNorm.apply(x, x0, lambda_r, lambda_0, dlambda_r, dlambda_0, "y" if y_only else "s, y")


def norm_factors_ref(x: Tensor, x0: Tensor, lambda_r: Tensor, lambda_0: Tensor) -> tuple[Tensor, ...]:
    s = lambda_r * upcast(x) + lambda_0 * upcast(x0)
    rstd = torch.rsqrt(s.square().mean(-1) + EPS)
    return s.to(x.dtype), s.to(x.dtype), rstd, x0


def norm_factors(
    x: Tensor,
    x0: Tensor | None = None,
    lambda_r: Tensor | None = None,
    lambda_0: Tensor | None = None,
    y_only: bool = False,
) -> tuple[Tensor | Factors | None, ...]:
    """`rms_norm` with a y that is not written but left to the op that reads it, as `Factors`.

    Args:
        x, x0, lambda_r, lambda_0: those of `rms_norm`.
        y_only: s is not wanted for itself. It is made all the same: it is a factor.

    Returns:
        (s, y), and with `x0` also a view of it, as `rms_norm` does. With `x0` y is for `qkv_projection`: the kernels
        take the gradient of its stream to be rstd ⊙ dy, and add by themselves what reaches x through rstd. Without it y
        is for `relu2_mlp`, which takes rstd itself: nothing is left to do here.

    Raises:
        ValueError: shapes, dtypes or strides that the kernels do not take.
    """
    if x0 is None:
        return None if y_only else x, Factors(x, None)
    if use_kernels(x):
        dlambda_r, dlambda_0 = getattr(lambda_r, "main_grad", None), getattr(lambda_0, "main_grad", None)
        s, factor, rstd, x0 = _RMSNorm.apply(x, x0, lambda_r, lambda_0, dlambda_r, dlambda_0, "factors")
    else:
        s, factor, rstd, x0 = norm_factors_ref(x, x0, lambda_r, lambda_0)
    return None if y_only else s, Factors(factor, rstd), x0


def cost(
    rows: int, width: int, has_x0: bool = False, has_s: bool = True, has_y: bool = True,
    itemsize: int = 2, backward: bool = False,
) -> tuple[int, int]:  # fmt: skip
    """Bytes that have to move and FLOPs, for [rows, width]; without `has_s`, of `y_only`; without `has_y`, of
    `norm_factors`."""
    if not backward:
        tensors = 1 + has_x0 + (has_x0 and has_s) + has_y  # the inputs, s, y
        return rows * (width * tensors * itemsize + 4), rows * width * (4 + 3 * has_x0)
    tensors = 2 + 1 + 3 * has_x0 + 1  # ds, dy, what was kept, dx; and x0, dx0 as read and written
    return rows * (width * tensors * itemsize + 4), rows * width * (9 + 9 * has_x0)
