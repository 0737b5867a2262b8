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


def compiled(model: GPT) -> Callable[..., Tensor]:
    """`model` as the ops in force call it: compiled, or as it is."""
    if not kernels.compiles():
        return model
    device = model.wte.device
    kernels.prepare_compiled_attention(model.config.seq_len, model.config.windows, device)
    # A break would cost speed and go unnoticed, so it is an error; only older FlashAttention-3 builds cannot be traced.
    fullgraph = kernels.compiled_attention(device) != "FlashAttention-3"
    return torch.compile(model, dynamic=False, fullgraph=fullgraph)


def compiled_update(optimizer: Optimizer) -> Callable[[Tensor], Tensor]:
    """`optimizer.update` as the ops in force call it."""
    return torch.compile(optimizer.update, dynamic=False, fullgraph=True) if kernels.compiles() else optimizer.update
