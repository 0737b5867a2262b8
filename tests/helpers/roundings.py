"""What fp32 may err by: a computation in fp64 in which every operation is off by as much as its rounding may cost.

PyTorch's own error in fp32 is no measure of another's. Every BLAS splits a sum as its CPU's registers like it, and of a
single row or a few numbers the error is luck: it may be next to nothing. The arithmetic's is neither. One operation
rounds its result, by up to u = 2⁻²⁴ of it, and a sum of n terms, in whatever order, is off by no more than a small
multiple of √n·u·Σ|terms|, but in one case of very many (Higham and Mary, A New Approach to Probabilistic Rounding Error
Analysis, SIAM J. Sci. Comput. 41(5), 2019, theorem 3.1). What becomes of that further on, the computation itself shows.
"""

import math

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
UNIT = 2.0**-24
EXACT = {aten.clone.default, aten.where.self, aten.neg.default}


class Roundings(TorchDispatchMode):
    """Inside, what an operation gives in fp64 is off by the bounds above, with signs drawn by `seed`."""

    def __init__(self, seed: int):
        super().__init__()
        self.seed = seed
        self.written_out = sdpa_kernel(SDPBackend.MATH)  # attention, as operations that are known here

    def __enter__(self):
        self.written_out.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.written_out.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [args[0].clone(), *args[1:]] if func in SUMS and func._schema.is_mutable else args
        out = func(*args, **kwargs)
        if not isinstance(out, Tensor) or out.dtype != torch.float64:
            return out
        if func in SUMS:
            terms, size = SUMS[func](*given, **kwargs)
            error = math.sqrt(terms) * UNIT * size
        elif torch.Tag.pointwise in func.tags and func not in EXACT:
            error = UNIT * out.abs()
        else:
            return out  # moved, and not computed
        self.seed += 1
        generator = torch.Generator(out.device).manual_seed(self.seed)
        signs = torch.randint(2, out.shape, generator=generator, device=out.device) * 2 - 1
        error = torch.where(out.isfinite(), signs * error, 0.0)  # the scores of what a mask hides are −∞
        return out.add_(error) if func._schema.is_mutable else out + error


def product(a: Tensor, b: Tensor) -> tuple[int, Tensor]:
    return a.shape[-1], a.abs() @ b.abs()


def plus_product(c: Tensor, a: Tensor, b: Tensor, *, beta=1, alpha=1) -> tuple[int, Tensor]:
    return a.shape[-1] + 1, abs(beta) * c.abs() + abs(alpha) * (a.abs() @ b.abs())


def along(reduce):
    def bound(x: Tensor, *args, **kwargs) -> tuple[int, Tensor]:
        size = reduce(x.abs(), *args, **kwargs)
        return x.numel() // max(1, size.numel()), size

    return bound


def softmax(x: Tensor, dim: int, *_) -> tuple[int, Tensor]:
    return x.shape[dim], x.softmax(dim)


def softmax_backward(dy: Tensor, y: Tensor, dim: int, *_) -> tuple[int, Tensor]:
    return y.shape[dim], y * (dy.abs() + (dy * y).abs().sum(dim, keepdim=True))


def log_softmax(x: Tensor, dim: int, *_) -> tuple[int, Tensor]:
    return x.shape[dim], 1 + x.log_softmax(dim).abs() + x.abs().amax(dim, keepdim=True)


def log_softmax_backward(dy: Tensor, y: Tensor, dim: int, *_) -> tuple[int, Tensor]:
    return y.shape[dim], dy.abs() + y.exp() * dy.abs().sum(dim, keepdim=True)


def embedding_backward(dy: Tensor, tokens: Tensor, *rest) -> tuple[int, Tensor]:
    return int(tokens.unique(return_counts=True)[1].max()), aten.embedding_dense_backward(dy.abs(), tokens, *rest)


# Of each: how many terms its sums have, and the sums of what these are without their signs.
SUMS = {
    aten.mm.default: product,
    aten.bmm.default: product,
    aten.addmm.default: plus_product,
    aten.addmm_.default: plus_product,
    aten.baddbmm.default: plus_product,
    aten.sum.default: along(aten.sum),
    aten.sum.dim_IntList: along(aten.sum),
    aten.mean.default: along(aten.mean),
    aten.mean.dim: along(aten.mean),
    aten.linalg_vector_norm.default: along(aten.linalg_vector_norm),
    aten._softmax.default: softmax,
    aten._safe_softmax.default: softmax,
    aten._softmax_backward_data.default: softmax_backward,
    aten._log_softmax.default: log_softmax,
    aten._log_softmax_backward_data.default: log_softmax_backward,
    aten.embedding_dense_backward.default: embedding_backward,
}
