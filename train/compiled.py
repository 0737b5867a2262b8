"""Model and update under torch.compile: `--ops compile`, the baseline that the kernels have to beat.

What is compiled is the references and nothing else, in the way that favours them most. Forward, loss and backward are
one graph without a break, and inside it the gradients add up in their fp32 buffers; the update of all groups is
another.
`dynamic=False`: every micro-batch has one shape, and kernels made for one shape are the faster ones. The default mode,
as the published system: `max-autotune` would tune the baseline's products and leave ours, cuBLAS's, as they are.
Compiling happens in the untimed first steps, or in the rehearsal.
"""

from collections.abc import Callable

import torch
from torch import Tensor

import kernels
from model import GPT
from prepare import InputError

from .optimizer import Optimizer


def check_compiler(device: str) -> None:
    """Compiles one addition. Raises InputError where that fails: for want of a C++ compiler, most likely."""
    try:
        torch.compile(torch.add)(torch.zeros(1, device=device), 1)
    except RuntimeError as error:
        cause = str(error).splitlines()[0]
        raise InputError(
            f"--ops compile: torch.compile does not work here ({cause}): install g++, or name a C++ compiler in CXX,"
            " or choose other --ops"
        ) from None


def _compile(model: GPT, **options) -> Callable[..., Tensor]:
    device = model.wte.device
    kernels.prepare_compiled_attention(model.config.seq_len, model.config.windows, device)
    # A break would cost speed and go unnoticed, so it is an error; only older FlashAttention-3 builds cannot be traced.
    fullgraph = kernels.compiled_attention(device) != "FlashAttention-3"
    return torch.compile(model, dynamic=False, fullgraph=fullgraph, **options)


def compiled(model: GPT) -> Callable[..., Tensor]:
    """`model` as the ops in force call it: compiled, or as it is."""
    return _compile(model) if kernels.compiles() else model


def compiled_update(optimizer: Optimizer) -> Callable[[Tensor], Tensor]:
    """`optimizer.update` as the ops in force call it."""
    return torch.compile(optimizer.update, dynamic=False, fullgraph=True) if kernels.compiles() else optimizer.update


def partitioned(model: GPT) -> Callable[..., Tensor]:
    """`model` divided into forward and backward as when it is compiled; then each half runs op by op."""
    return _compile(model, backend="aot_eager_decomp_partition")


def bytes_kept_by_compiled(model: GPT, tokens: Tensor) -> int:
    """What the compiled forward of `tokens` [B, T] keeps for the backward: the division decides it, and nothing need be
    compiled for a count."""
    # A compiled model is given the gradients' buffers as well, to add to them in its backward.
    state = {t.untyped_storage().data_ptr() for p in model.parameters() for t in (p, getattr(p, "main_grad", p))}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = partitioned(model)(tokens, tokens)
    del loss  # alive until here, and with it what is kept: no address was used twice
    return sum(nbytes for address, nbytes in kept.items() if address not in state)
