"""What every op shares: the epsilon, the dtype of accumulation, and gradients that add up in place.

Gradients of weights. A training step is several micro-steps, and a bf16 accumulator would lose small terms, so a
parameter may carry `main_grad`: an fp32 tensor of its own shape into which the backward *adds*. `layer_weight` hands
such a parameter to the ops. An op may add to `weight.main_grad` itself and return no gradient, or return its gradient
as usual, which is then added for it. A parameter without `main_grad` follows PyTorch's own rules (`.grad`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # there is no Triton for macOS: there the kernels are defined, and never launched
    triton, tl = SimpleNamespace(jit=lambda function: function), SimpleNamespace(constexpr=int)

__all__ = [
    "EPS", "Factors", "GradScaled", "compiles", "device_type", "gpu_arch", "graph_is_kept", "layer_weight",
    "ops_in_force", "recomputed", "set_ops", "tl", "triton", "upcast", "use_cpu_forms", "use_kernels",
]  # fmt: skip

EPS = 2.0**-23  # fp32's machine epsilon, everywhere a norm divides


class Factors(NamedTuple):
    """A norm that nobody writes, y = rstd ⊙ stream, for an op that has it in its epilogue. No tensor: to every other op
    it is an error, where the stream itself would be another model without a word.

    Args:
        stream: [..., D].
        rstd: [...] in fp32, without a gradient of its own: what reaches the stream through it `norm_factors` adds. None
            where the op that reads y takes rstd itself, and all of the norm's backward.
    """

    stream: Tensor
    rstd: Tensor | None


class GradScaled(NamedTuple):
    """A tensor [..., N] of which the kernels want the gradient multiplied by `scale` [...], row by row. No tensor, so
    that it reaches none but an op that does so. References want it as it is."""

    tensor: Tensor
    scale: Tensor


_ops: str | None = None
_meta_device = "cuda"


def set_ops(ops: str | None) -> None:
    """Chooses for every op at once: "triton" (the kernels, on any device: the interpreter and meta tensors reach them
    too), "cpu" (kernels/cpu), "reference", "compile" (the references, for a caller who compiles what calls them), or
    None for the default: kernels on a GPU, references on a CPU."""
    global _ops
    if ops not in ("triton", "cpu", "reference", "compile", None):
        raise ValueError(f"ops {ops!r} must be 'triton', 'cpu', 'reference', 'compile' or None")
    _ops = ops


@contextmanager
def ops_in_force(ops: str | None, meta_device: str = "cuda") -> Iterator[None]:
    """Inside, `set_ops(ops)`, and tensors of device "meta" stand for tensors of `meta_device`; afterwards as before."""
    global _meta_device
    before = _ops, _meta_device
    set_ops(ops)
    _meta_device = meta_device
    try:
        yield
    finally:
        set_ops(before[0])
        _meta_device = before[1]


def device_type(x: Tensor) -> str:
    """Of the device that holds `x`; of a tensor without memory, of the one that it stands for."""
    return _meta_device if x.is_meta else x.device.type


def use_kernels(x: Tensor) -> bool:
    """Whether an op on `x` runs its Triton kernels. Raises ValueError where Triton would launch them on another GPU."""
    if not (x.is_cuda if _ops is None else _ops == "triton"):
        return False
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        raise ValueError(f"a tensor is on {x.device}, and kernels run on the current one: torch.cuda.set_device first")
    return True


def use_cpu_forms() -> bool:
    """Whether an op runs its form for a CPU (kernels/cpu)."""
    return _ops == "cpu"


def gpu_arch() -> int:
    """Ten times the compute capability that kernels are compiled for; 0 where there is no GPU, as for the interpreter.
    Raises what Triton raises where there is one and no way to it, for want of a C compiler for example."""
    try:
        return triton.runtime.driver.active.get_current_target().arch
    except RuntimeError:
        if any(backend.driver.is_active() for backend in triton.backends.backends.values()):
            raise
        return 0


def compiles() -> bool:
    """Whether the caller is to compile what calls the ops."""
    return _ops == "compile"


def upcast(x: Tensor) -> Tensor:
    """`x` in the dtype that sums and norms are taken in: fp32 for 16-bit inputs, fp32 and fp64 as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class _AddToMainGrad(torch.autograd.Function):
    """The identity. Its backward adds the gradient to `main_grad` and passes nothing on."""

    @staticmethod
    def forward(ctx, weight, main_grad):
        ctx.set_materialize_grads(False)  # an op that added its gradient itself sends None
        ctx.main_grad = main_grad
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad):
        if grad is not None:
            ctx.main_grad.add_(grad)
        return None, None


def layer_weight(parameter: Tensor, layer: int | None = None) -> Tensor:
    """The matrix of one layer from a stack of them, its gradient bound for `parameter.main_grad` where there is one.

    Args:
        parameter: [layers, rows, cols], or a single weight of any shape when `layer` is None.
        layer: index into the first dimension.
    """
    weight = parameter if layer is None else parameter[layer]
    main_grad = getattr(parameter, "main_grad", None)
    if main_grad is None or not torch.is_grad_enabled():
        return weight
    main_grad = main_grad if layer is None else main_grad[layer]
    weight = _AddToMainGrad.apply(weight, main_grad)
    weight.main_grad = main_grad
    return weight


def _stream(y: Tensor | Factors) -> Tensor:
    return y.stream if isinstance(y, Factors) else y


@contextmanager
def recomputed(tensor: Tensor | Factors, again: Callable[[], Tensor | Factors]) -> Iterator[None]:
    """Inside, an op that keeps `tensor` or a view of it for its backward keeps `again` instead, which makes the same
    bits: once, however many ops ask for them. References keep what they keep: their intermediates are not known here.
    Of factors it is the stream.
    """
    tensor = _stream(tensor)
    if not use_kernels(tensor):
        yield
        return
    storage = tensor.untyped_storage()._cdata  # alive while the context is open, so that no other has this address
    made = None
    # PyTorch calls the innermost hooks alone: what they let pass goes on to those around them.
    outer_pack, outer_unpack = torch._C._autograd._top_saved_tensors_default_hooks(True) or (lambda kept: kept,) * 2

    def pack(kept):
        if kept.untyped_storage()._cdata != storage:
            return None, outer_pack(kept)
        return (kept.size(), kept.stride(), kept.storage_offset()), None

    def unpack(packed):
        nonlocal made
        view, kept = packed
        if view is None:
            return outer_unpack(kept)
        if made is None:
            with torch.no_grad():
                made = _stream(again())
        return made.as_strided(*view)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def graph_is_kept() -> bool:
    """In a backward: whether there may be another through the same graph (`retain_graph`). If not, what was saved for
    this one is an op's own, to write into; PyTorch's compiler asks the same before it donates a saved tensor."""
    return torch._C._autograd._get_current_graph_task_keep_graph()
