"""Rows of several tables, looked up with the same tokens: out[i] = table[i][tokens].

Backward: dtable[v] = Σ over the positions whose token is v of dout, in a fixed order, so that two runs agree. The
tokens are sorted once; a token's positions then lie side by side, in segments that all tables share. A segment longer
than `SPLIT` is cut into pieces of `SPLIT`: the first belongs to the program of its token, every other one to a program
of its own that leaves a partial row, and the token's program adds those up. There are at most N / SPLIT such partial
rows, whatever the tokens are, so no shape depends on them, and a frequent token is no program's whole work.

tokens: [...], N in all; table: [V, width]; out: [..., width]. Saved: the tokens.
Bytes per token and table of width D in 16 bits: 4D forward, 2D backward and 8D per token that occurs (fp32, read and
written). FLOPs: none forward, D backward. A token outside [0, V) reads NaN, which the step's finite check then finds.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .choice import Choice, Tile, elements, fitting_block, fitting_blocks, grid
from .common import tl, triton, use_cpu_forms, use_kernels
from .cpu import embedding_cpu


def embedding_ref(tokens: Tensor, tables: Sequence[Tensor]) -> list[Tensor]:
    return [F.embedding(tokens, table) for table in tables]


@triton.jit
def _embedding_fwd_kernel(
    tokens_ptr, table_ptr, out_ptr, table_stride_v, N, V, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (offs_n < N)[:, None] & (offs_d < D)[None, :]
    token = tl.load(tokens_ptr + offs_n, mask=offs_n < N, other=0).to(tl.int64)
    known = (token >= 0) & (token < V)
    rows = tl.load(
        table_ptr + token[:, None] * table_stride_v + offs_d[None, :], mask=mask & known[:, None], other=float("nan")
    )
    tl.store(out_ptr + offs_n[:, None] * D + offs_d[None, :], rows, mask=mask)


@triton.jit
def _sum_rows(dout_ptr, order_ptr, begin, end, offs_d, D, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """Σ of dout over the sorted positions [begin, end): [BLOCK_R, BLOCK_D], still to be summed over the first."""
    acc = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    for start in range(begin, end, BLOCK_R):
        offs_r = start + tl.arange(0, BLOCK_R)
        row = tl.load(order_ptr + offs_r, mask=offs_r < end, other=0)  # int64
        mask = (offs_r < end)[:, None] & (offs_d < D)[None, :]
        acc += tl.load(dout_ptr + row[:, None] * D + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    return acc


@triton.jit
def _embedding_bwd_pieces_kernel(
    dout_ptr, order_ptr, starts_ptr, piece_ends_ptr, piece_token_ptr, partial_ptr, V, D,
    SPLIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The partial row of one piece that is not its token's first. Programs past the last piece have nothing to do."""
    piece = tl.program_id(0)
    token = tl.load(piece_token_ptr + piece)
    if token < V:
        offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        first = tl.load(starts_ptr + token)
        last = tl.load(starts_ptr + token + 1)
        left = tl.load(piece_ends_ptr + token) - piece  # pieces of this token from here on
        begin = first + ((last - first + SPLIT - 1) // SPLIT - left) * SPLIT
        end = tl.minimum(begin + SPLIT, last)
        acc = _sum_rows(dout_ptr, order_ptr, begin, end, offs_d, D, BLOCK_R, BLOCK_D)
        tl.store(partial_ptr + piece.to(tl.int64) * D + offs_d, tl.sum(acc, axis=0), mask=offs_d < D)


@triton.jit
def _embedding_bwd_kernel(
    dout_ptr, order_ptr, starts_ptr, piece_ends_ptr, partial_ptr, dtable_ptr, dtable_stride_v, D,
    SPLIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds a token's first piece and the partial rows of the others to its row of dtable."""
    token = tl.program_id(0).to(tl.int64)
    first = tl.load(starts_ptr + token)
    last = tl.load(starts_ptr + token + 1)
    if last > first:
        offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        acc = _sum_rows(dout_ptr, order_ptr, first, tl.minimum(first + SPLIT, last), offs_d, D, BLOCK_R, BLOCK_D)
        end = tl.load(piece_ends_ptr + token)
        begin = end - ((last - first + SPLIT - 1) // SPLIT - 1)
        for start in range(begin, end, BLOCK_R):
            offs_r = start + tl.arange(0, BLOCK_R)
            mask = (offs_r < end)[:, None] & (offs_d < D)[None, :]
            acc += tl.load(partial_ptr + offs_r[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
        ptrs = dtable_ptr + token * dtable_stride_v + offs_d
        total = tl.load(ptrs, mask=offs_d < D, other=0.0) + tl.sum(acc, axis=0)
        tl.store(ptrs, total, mask=offs_d < D)


SPLIT = 128  # rows of dout that one program sums


def _config(D: int) -> Tile:
    """Tiles of 4,096 elements for four warps: four vectors of 16 bytes a thread in 16 bits."""
    block_d = fitting_block(D, 512)
    return {"BLOCK": min(4096 // block_d, 32), "BLOCK_D": block_d, "num_warps": 4}


def _candidates(D: int, dtype: torch.dtype) -> list[Tile]:
    return grid(
        elements(lambda tile: tile["BLOCK"] * tile["BLOCK_D"], 16, 32), BLOCK=(4, 8, 16, 32),
        BLOCK_D=fitting_blocks(D, [block for block in (128, 256, 512) if block < 2 * D]), num_warps=(1, 2, 4, 8),
    )  # fmt: skip


# Of a table's rows: (D, dtype).
LOOK_UP = Choice("embedding-forward", [_embedding_fwd_kernel], lambda D, dtype: _config(D), _candidates)
SUM_UP = Choice(
    "embedding-backward", [_embedding_bwd_pieces_kernel, _embedding_bwd_kernel], lambda D, dtype: _config(D),
    _candidates,
)  # fmt: skip


def _check(tokens: Tensor, tables: Sequence[Tensor]) -> None:
    if tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise ValueError(f"tokens: {tokens.dtype}, expected integers")
    for i, table in enumerate(tables):
        if table.ndim != 2 or table.shape[0] != tables[0].shape[0]:
            raise ValueError(f"tables[{i}]: {tuple(table.shape)}, expected [{tables[0].shape[0]}, width]")
        if table.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"tables[{i}]: {table.dtype}, the kernels take float32, float16 and bfloat16")
        if table.stride(1) != 1 and table.shape[1] != 1:
            raise ValueError(f"tables[{i}]: stride {table.stride(1)} along a row, the kernels need 1")


def _segments(tokens: Tensor, vocab_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where in the sorted tokens each token's positions are, and which pieces they are cut into.

    Args:
        tokens: [N], int32.

    Returns:
        order [N]: the positions, sorted by token, then by position;
        starts [V + 1]: token v has order[starts[v] : starts[v + 1]];
        piece_ends [V]: Σ over the tokens up to v of the pieces after their first;
        piece_token [N // SPLIT]: the token of each such piece, V for those that do not exist.
    """
    device = tokens.device
    ordered, order = tokens.sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(vocab_size + 1, dtype=torch.int32, device=device))
    pieces = (starts.diff() + SPLIT - 1) // SPLIT
    piece_ends = (pieces - 1).clamp_min(0).cumsum(0)
    numbers = torch.arange(tokens.numel() // SPLIT, device=device)
    return order, starts, piece_ends, torch.searchsorted(piece_ends, numbers, right=True)


def _add_segments(dout: Tensor, dtable: Tensor, segments: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """dtable [V, D] fp32 += Σ of the rows of dout [N, D], token by token."""
    order, starts, piece_ends, piece_token = segments
    V, D = dtable.shape
    config = SUM_UP(D, dout.dtype)
    block = {"SPLIT": SPLIT, "BLOCK_R": config["BLOCK"], "BLOCK_D": config["BLOCK_D"], "num_warps": config["num_warps"]}
    blocks_d = triton.cdiv(D, config["BLOCK_D"])
    partial = torch.empty(piece_token.numel(), D, dtype=torch.float32, device=dout.device)
    if piece_token.numel():
        _embedding_bwd_pieces_kernel[(piece_token.numel(), blocks_d)](
            dout, order, starts, piece_ends, piece_token, partial, V, D, **block
        )
    _embedding_bwd_kernel[(V, blocks_d)](
        dout, order, starts, piece_ends, partial, dtable, dtable.stride(0), D, **block
    )


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, main_grads, *tables):
        _check(tokens, tables)
        ctx.set_materialize_grads(False)
        # A wider integer outside the vocabulary stays outside when it is narrowed.
        flat = (tokens.clamp(-1, 2**31 - 1) if tokens.dtype == torch.int64 else tokens).reshape(-1).to(torch.int32)
        outs = []
        for table in tables:
            V, D = table.shape
            out = torch.empty(*tokens.shape, D, dtype=table.dtype, device=table.device)
            config = LOOK_UP(D, table.dtype)
            programs = (triton.cdiv(flat.numel(), config["BLOCK"]), triton.cdiv(D, config["BLOCK_D"]))
            _embedding_fwd_kernel[programs](
                flat, table, out, table.stride(0), flat.numel(), V, D,
                BLOCK_N=config["BLOCK"], BLOCK_D=config["BLOCK_D"], num_warps=config["num_warps"],
            )  # fmt: skip
            outs.append(out)
        ctx.save_for_backward(flat)
        ctx.main_grads = main_grads
        ctx.tables = [(table.shape, table.dtype) for table in tables]
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *douts):
        (flat,) = ctx.saved_tensors
        segments = _segments(flat, ctx.tables[0][0][0])
        dtables = []
        needed = ctx.needs_input_grad[2:]
        for (shape, dtype), main_grad, dout, needs in zip(ctx.tables, ctx.main_grads, douts, needed, strict=True):
            if dout is None or not needs:
                dtables.append(None)
                continue
            dtable = torch.zeros(shape, dtype=torch.float32, device=flat.device) if main_grad is None else main_grad
            _add_segments(dout.reshape(-1, shape[1]).contiguous(), dtable, segments)
            dtables.append(dtable.to(dtype) if main_grad is None else None)
        return None, None, *dtables


def embedding(tokens: Tensor, tables: Sequence[Tensor]) -> list[Tensor]:
    """Look-ups in all tables at once.

    Args:
        tokens: [...], integers in [0, V).
        tables: tensors [V, width], the widths may differ. Into the `main_grad` of those that carry one the kernels
            add the gradient.

    Returns:
        one tensor [..., width] per table; for a token outside [0, V) the kernels give NaN.

    Raises:
        ValueError: tokens that are no integers, or tables that the kernels do not take.
    """
    if use_cpu_forms():
        return embedding_cpu(tokens, tables)
    if not use_kernels(tables[0]):
        return embedding_ref(tokens, tables)
    return list(_Embedding.apply(tokens, [getattr(table, "main_grad", None) for table in tables], *tables))


def cost(
    tokens: int, vocab_size: int, widths: Sequence[int], itemsize: int = 2, backward: bool = False
) -> tuple[int, int]:
    """Bytes that have to move and FLOPs, where most of the vocabulary occurs."""
    width = sum(widths)
    rows = min(tokens, vocab_size)
    if not backward:
        return 4 * tokens + (rows + tokens) * width * itemsize, 0
    return 4 * tokens + tokens * width * itemsize + 2 * rows * width * 4, tokens * width
