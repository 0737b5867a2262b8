"""Rows of a head, loaded by pointers or, on Hopper, by the tensor memory accelerator."""

from torch import Tensor

from ..common import tl, triton

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # no Triton, no kernels
    TensorDescriptor = None


@triton.jit
def load_rows(
    source, batch, first, head, seq_len, batch_stride,
    STRIDE: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Tokens first to first + ROWS of one head: [ROWS, HEAD_DIM], zero past the end of the sequence.

    `source` is a pointer to a tensor [B, T, heads · HEAD_DIM] with a stride of STRIDE along T, or with TMA what
    `row_source` made of it. Without MASKED the caller knows that all of them are tokens.
    """
    if TMA:
        rows = source.load([batch.to(tl.int32), first, head * HEAD_DIM]).reshape(ROWS, HEAD_DIM)
    else:
        base = source + (batch.to(tl.int64) * batch_stride + head * HEAD_DIM) + first * tl.full((), STRIDE, tl.int64)
        offs = tl.arange(0, ROWS)
        ptrs = base + (offs[:, None] * STRIDE + tl.arange(0, HEAD_DIM)[None, :])
        if MASKED:
            rows = tl.load(ptrs, mask=(first + offs < seq_len)[:, None], other=0.0)
        else:
            rows = tl.load(ptrs)
    return rows


def fits_tma(*tensors: Tensor) -> bool:
    """Whether a descriptor takes them: their tokens evenly spaced from sequence to sequence (CUDA wants the stride of a
    dimension to be a multiple of the one inside it), each at a multiple of 16 bytes."""
    return all(
        x.data_ptr() % 16 == 0 and x.stride(1) * x.itemsize % 16 == 0 and x.stride(0) == x.shape[1] * x.stride(1)
        for x in tensors
    )


def row_source(x: Tensor, rows: int, head_dim: int, tma: bool) -> "Tensor | TensorDescriptor":
    """What `load_rows` takes for x [B, T, heads · head_dim] and tiles of `rows` tokens."""
    return TensorDescriptor.from_tensor(x, [1, rows, head_dim]) if tma else x
