"""dW = dyᵀ·x, the gradient of the weight of y = x·Wᵀ, summed in fp32: every op with a weight makes its own by it.

dy: [M, N]; x: [M, K]; dW: [N, K], added to `main_grad` where there is one. There are 10⁵ rows and more, and so few
tiles of dW that they do not fill a GPU: the rows have to be cut into slices, and the sums of the slices added up.

    partial[s] = Σ dy[m]ᵀ·x[m] over the rows m of slice s;  dW = Σ partial[s]

The vendor's product cuts as it sees fit. Here the number of slices is part of the tile, and both sums have a fixed
order. With one slice nothing is partial: dW goes where it belongs at once. A dW of a few rows, the value gate's, is no
work for tensor cores: there a program adds up outer products.

Bytes: 2M(N + K) of factors in 16 bits, 8NK of `main_grad`, and 8NK for each slice: 35 MB for 132 programs with tiles of
128 x 256, where the factors are 0.5 to 1.3 GB (M = 262,144). FLOPs: 2MNK.
"""

from functools import cache

import torch
from torch import Tensor

from .choice import Choice, Tile
from .common import gpu_arch, tl, triton

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # no Triton, no kernels
    TensorDescriptor = None

__all__ = ["weight_grad"]


@triton.jit
def _rows_of_slice(s, M, slices, BLOCK_M: tl.constexpr):
    """First and end, int32: whole blocks but for the last slice that has any."""
    rows = tl.cdiv(tl.cdiv(M, BLOCK_M), slices) * BLOCK_M
    return s * rows, tl.minimum((s + 1) * rows, M)


@triton.jit
def _put(out_ptr, value, rows, columns, stride, ADD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Stores [BN, BK] of which `rows` and `columns` count; with ADD added to what stands there."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    ptrs = out_ptr + (offs_n[:, None] * stride + offs_k[None, :])
    mask = (offs_n < rows)[:, None] & (offs_k < columns)[None, :]
    if ADD:
        value += tl.load(ptrs, mask=mask, other=0.0)
    tl.store(ptrs, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _slice_kernel(
    dy_source, x_source, out_ptr, dy_stride_m, x_stride_m, M, N, K, slices,
    ADD: tl.constexpr, EVEN_M: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of dW over the rows of one slice: out [slices, N, K]; with ADD to what stands there.

    Programs of one slice are neighbours: they read the same rows at about the same time, from the L2. The sources are
    pointers, or with TMA descriptors.
    """
    tiles_k = tl.cdiv(K, BLOCK_K)
    tiles = tl.cdiv(N, BLOCK_N) * tiles_k
    s = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    first_n = tile // tiles_k * BLOCK_N
    first_k = tile % tiles_k * BLOCK_K
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    offs_k = first_k + tl.arange(0, BLOCK_K)
    first, end = _rows_of_slice(s, M, slices, BLOCK_M)
    if not TMA:
        offs_row = first.to(tl.int64) + offs_m
        dy_ptrs = dy_source + offs_n[:, None] + offs_row[None, :] * dy_stride_m  # [BN, BM], dyᵀ as it lies in memory
        x_ptrs = x_source + offs_row[:, None] * x_stride_m + offs_k[None, :]  # [BM, BK]
    acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for row in range(first, end, BLOCK_M):
        if TMA:  # rows past M read as zero
            dy = tl.trans(dy_source.load([row, first_n]))
            x = x_source.load([row, first_k])
        else:
            mask_n = (offs_n < N)[:, None]
            mask_k = (offs_k < K)[None, :]
            if not EVEN_M:
                mask_n = mask_n & (offs_m < end - row)[None, :]
                mask_k = mask_k & (offs_m < end - row)[:, None]
            dy = tl.load(dy_ptrs, mask=mask_n, other=0.0)
            x = tl.load(x_ptrs, mask=mask_k, other=0.0)
            dy_ptrs += BLOCK_M * dy_stride_m
            x_ptrs += BLOCK_M * x_stride_m
        acc = tl.dot(dy, x, acc, input_precision="ieee")
    out_ptr += (s.to(tl.int64) * N + first_n) * K + first_k
    # By halves: all that stands there would need as many registers as the sums.
    halves = tl.permute(tl.reshape(acc, [BLOCK_N, 2, BLOCK_K // 2]), [0, 2, 1])
    left, right = tl.split(halves)
    _put(out_ptr, left, N - first_n, K - first_k, K, ADD, BLOCK_N, BLOCK_K // 2)
    _put(out_ptr + BLOCK_K // 2, right, N - first_n, K - first_k - BLOCK_K // 2, K, ADD, BLOCK_N, BLOCK_K // 2)


@triton.jit
def _outer_kernel(
    dy_ptr, x_ptr, partial_ptr, dy_stride_m, x_stride_m, M, N, K, slices,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """All of a small dW over the rows of one slice: partial [slices, N, K]. Sums of BLOCK_M rows apart, then of these:
    nothing but products and sums of a thread's own is in the loop."""
    s = tl.program_id(0)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    first, end = _rows_of_slice(s, M, slices, BLOCK_M)
    acc = tl.zeros([BLOCK_N, BLOCK_M, BLOCK_K], dtype=tl.float32)
    for row in range(first, end, BLOCK_M):
        offs_row = (row + offs_m).to(tl.int64)
        mask_m = offs_m < end - row
        dy_mask = (offs_n < N)[:, None] & mask_m[None, :]
        dy = tl.load(dy_ptr + offs_n[:, None] + offs_row[None, :] * dy_stride_m, mask=dy_mask, other=0.0)
        x_mask = mask_m[:, None] & (offs_k < K)[None, :]
        x = tl.load(x_ptr + offs_row[:, None] * x_stride_m + offs_k[None, :], mask=x_mask, other=0.0)
        acc += dy.to(tl.float32)[:, :, None] * x.to(tl.float32)[None, :, :]
    offs = offs_n[:, None] * K + offs_k[None, :]
    mask = (offs_n < N)[:, None] & (offs_k < K)[None, :]
    tl.store(partial_ptr + s * N * K + offs, tl.sum(acc, axis=1), mask=mask)


@triton.jit
def _sum_kernel(
    partial_ptr, out_ptr, size, slices, ADD: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr
):
    """out [size] = Σ partial [slices, size], always in the same order; with ADD added to what stands there."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    offs_s = tl.arange(0, BLOCK_S).to(tl.int64)
    mask = offs < size
    acc = tl.zeros([BLOCK_S, BLOCK], dtype=tl.float32)
    for start in range(0, slices, BLOCK_S):
        ptrs = partial_ptr + (start + offs_s)[:, None] * size + offs[None, :]
        acc += tl.load(ptrs, mask=(start + offs_s < slices)[:, None] & mask[None, :], other=0.0)
    total = tl.sum(acc, axis=0)
    if ADD:
        total += tl.load(out_ptr + offs, mask=mask, other=0.0)
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=mask)


SMALL_ROWS, SMALL_SIZE = 16, 1024  # of a dW that outer products may make: the value gate's is 4 x 32

# Multiprocessors of a GPU of each architecture: A100, RTX 3090, RTX 4090, H100 and H200, B200, B300, RTX 5090 (NVIDIA's
# data sheets). For candidates alone: on another one theirs are other waves.
PROCESSORS = {80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 103: 160, 120: 170}


def _is_small(N: int, K: int) -> bool:
    return N <= SMALL_ROWS and triton.next_power_of_2(N) * triton.next_power_of_2(K) <= SMALL_SIZE


def _forms(arch: int) -> list[tuple[Tile, int, tuple[int, ...]]]:
    """(tile, programs that a multiprocessor holds, waves): without spills, and whose stages fit."""

    def form(block_n, block_k, block_m, warps, stages, tma=False):
        return {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "tma": tma, "num_warps": warps,
                "num_stages": stages}  # fmt: skip

    if arch in (90, 100, 103):
        return [
            (form(128, 256, 64, 8, 3, tma=True), 1, (1, 2, 4)),
            (form(256, 128, 64, 8, 3, tma=True), 1, (1, 2)),
            (form(128, 256, 64, 8, 4, tma=True), 1, (1,)),
            (form(128, 128, 64, 8, 3, tma=True), 2, (1, 2)),
            (form(128, 128, 64, 4, 3, tma=True), 2, (1,)),
            (form(128, 256, 64, 8, 3), 1, (1, 2)),
            (form(128, 128, 64, 8, 3), 2, (1,)),
        ]
    smaller = [
        (form(128, 256, 32, 8, 4), 1, (1, 2, 4)),
        (form(128, 128, 32, 8, 4), 2, (1, 2)),
        (form(128, 128, 64, 8, 3), 1, (1, 2)),
        (form(64, 128, 64, 4, 3), 2, (1, 2)),
    ]
    return smaller + [(form(128, 256, 64, 8, 3), 1, (1, 2))] * (arch == 80)


def _candidates(N: int, K: int, dtype: torch.dtype) -> list[Tile]:
    """Own ways, in numbers of slices with which all programs are about whole waves of the GPU."""
    if dtype.itemsize > 2:
        return []
    arch = gpu_arch()
    processors = PROCESSORS.get(arch, PROCESSORS[90])
    if _is_small(N, K):  # 32 sums a thread
        rows = 1024 // (triton.next_power_of_2(N) * triton.next_power_of_2(K))
        return [
            {"way": "outer", "SLICES": processors * programs, "BLOCK_M": rows * warps, "num_warps": warps}
            for warps in (4, 8) for programs in (2, 4, 8)
        ]  # fmt: skip
    if N % 16 or K % 16:  # rows are not aligned: elements would be loaded one by one
        return []
    found = []
    for tile, at_once, waves in _forms(arch):
        if tile["BLOCK_N"] < 2 * N and tile["BLOCK_K"] < 2 * K:
            tiles = triton.cdiv(N, tile["BLOCK_N"]) * triton.cdiv(K, tile["BLOCK_K"])
            # More tiles than are computed at once are whole waves of one slice only by chance.
            several = waves if tiles <= processors * at_once else (1, 4 // at_once)
            for room in (processors * at_once * n for n in several):
                slices = max(1, room // tiles)
                if slices * tiles > 0.75 * room:
                    found.append({"way": "slices", "SLICES": slices, **tile})
    return found


# Of a weight [N, K]: (N, K, dtype). Nothing has been measured yet.
WEIGHT_GRAD = Choice(
    "weight-gradient", [_slice_kernel, _outer_kernel, _sum_kernel], lambda N, K, dtype: {"way": "vendor"}, _candidates
)


def _fits_tma(*tensors: Tensor) -> bool:
    """Whether a descriptor takes them: rows apart, each at a multiple of 16 bytes."""
    return all(
        x.data_ptr() % 16 == 0 and x.stride(0) * x.itemsize % 16 == 0 and x.stride(0) >= x.shape[1] and x.stride(1) == 1
        for x in tensors
    )


def _by_kernels(dy: Tensor, x: Tensor, out: Tensor, add: bool, tile: Tile) -> None:
    """dW to `out` [N, K], contiguous; with `add` to what stands there, in fp32."""
    (M, N), K = dy.shape, x.shape[1]
    # Along a row the kernels read what lies side by side.
    dy, x = (t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous() for t in (dy, x))
    outer, slices = tile["way"] == "outer", tile["SLICES"]
    partial = out
    if outer or slices > 1:
        partial = torch.empty(slices, N, K, dtype=torch.float32, device=x.device)
    sizes = dy.stride(0), x.stride(0), M, N, K, slices
    options = {key: value for key, value in tile.items() if key not in ("way", "SLICES", "tma")}
    if outer:
        blocks = {"BLOCK_N": triton.next_power_of_2(N), "BLOCK_K": triton.next_power_of_2(K)}
        _outer_kernel[(slices,)](dy, x, partial, *sizes, **blocks, **options)
    else:
        tma = tile["tma"] and _fits_tma(dy, x)
        sources = dy, x
        if tma:
            blocks = [tile["BLOCK_M"], tile["BLOCK_N"]], [tile["BLOCK_M"], tile["BLOCK_K"]]
            sources = map(TensorDescriptor.from_tensor, sources, blocks)
        programs = slices * triton.cdiv(N, tile["BLOCK_N"]) * triton.cdiv(K, tile["BLOCK_K"])
        _slice_kernel[(programs,)](
            *sources, partial, *sizes,
            ADD=add and partial is out, EVEN_M=M % tile["BLOCK_M"] == 0, TMA=tma, **options,
        )  # fmt: skip
    if partial is not out:
        # All threads read side by side; of very many partial sums several at once, since there are few programs.
        block_s = min(triton.next_power_of_2(slices), 128 if outer else 8)
        block = 4096 // block_s
        _sum_kernel[(triton.cdiv(N * K, block),)](
            partial, out, N * K, slices, ADD=add, BLOCK_S=block_s, BLOCK=block, num_warps=4
        )


@cache
def _has_accumulating_gemm(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `addmm` takes 16-bit factors and adds their product to an fp32 matrix in place: tried once a device.

    Seen in the sources of PyTorch 2.11 and later; earlier ones raise, since they want all three of one dtype.
    """
    out = torch.full((16, 16), 0.5, device=device)
    factor = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        torch.addmm(out, factor.mT, factor, out_dtype=torch.float32, out=out)
    except (RuntimeError, TypeError):
        return False
    return bool((out == 16.5).all())


def _by_vendor(dy: Tensor, x: Tensor, main_grad: Tensor | None) -> Tensor | None:
    if main_grad is None:
        return torch.mm(dy.mT, x)
    if x.dtype == main_grad.dtype:
        main_grad.addmm_(dy.mT, x)
    elif x.is_meta:
        pass  # as the next: in place, with nothing allocated; not every PyTorch knows that product without memory
    elif x.is_cuda and _has_accumulating_gemm(x.device, x.dtype):
        # C and D of the GEMM are main_grad: it is read and written once, and the product never exists by itself.
        torch.addmm(main_grad, dy.mT, x, out_dtype=main_grad.dtype, out=main_grad)
    elif x.is_cuda:
        main_grad.add_(torch.mm(dy.mT, x, out_dtype=main_grad.dtype))
    else:
        main_grad.addmm_(dy.mT.to(main_grad.dtype), x.to(main_grad.dtype))
    return None


def weight_grad(dy: Tensor, x: Tensor, main_grad: Tensor | None) -> Tensor | None:
    """dW = dyᵀ·x of y = x·Wᵀ, summed in fp32.

    Args:
        dy: [M, N]; x: [M, K], of one dtype and any strides; the kernels copy what has no unit stride along its rows.
        main_grad: [N, K] fp32, to which dW is added in place, or None.

    Returns:
        None where `main_grad` took the gradient, else dW in the dtype of x.
    """
    tile = WEIGHT_GRAD(dy.shape[1], x.shape[1], x.dtype)
    for_kernels = main_grad is None or (main_grad.is_contiguous() and main_grad.dtype == torch.float32)
    if tile["way"] == "vendor" or not for_kernels or dy.shape[0] == 0:
        return _by_vendor(dy, x, main_grad)
    if main_grad is not None:
        return _by_kernels(dy, x, main_grad, True, tile)
    dw = torch.empty(dy.shape[1], x.shape[1], dtype=x.dtype, device=x.device)
    _by_kernels(dy, x, dw, False, tile)
    return dw
