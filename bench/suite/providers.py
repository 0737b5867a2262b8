"""Who computes an op: our kernels, PyTorch, PyTorch compiled, and other libraries where they are installed.

A provider is judged at the op's own boundary. What a library leaves out is added around it in plain PyTorch, which the
docstring of its wrapper says, and its time counts. What it cannot compute at all is not listed. The interfaces were
read in Liger-Kernel 0.8.5, QuACK 0.6.5, FlashAttention 2.8 and 3; none of these has run here yet.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F

import kernels
from kernels.common import EPS
from kernels.linear_cross_entropy import IGNORED, SOFTCAP
from kernels.rotary_attention import rotary_attention_ref
from prepare.words import install_line
from train.tune.ops import Op
from train.tune.problems import FUSED, OPS, TRUTHS, Function, assert_close, forward, forward_backward, kind, truth_of


@dataclass(frozen=True)
class Provider:
    """`functions` by the kind of op that each computes (bench/suite/problems.py); called while `active`."""

    name: str
    ops: str  # what `kernels.set_ops` is told meanwhile
    functions: dict[str, Function] = field(default_factory=lambda: OPS)
    missing: str | None = None  # why it cannot run here, and what would mend that

    @contextmanager
    def active(self) -> Iterator[None]:
        kernels.set_ops(self.ops)
        try:
            yield
        finally:
            kernels.set_ops(None)

    def function(self, op: Op, device: str) -> Function:
        """What computes `op`. Compiled anew for every op: past a few shapes torch.compile would quietly stop to."""
        function = self.functions[kind(op)]
        if self.ops != "compile":
            return function
        torch._dynamo.reset()
        if op.module == "rotary_attention":
            where = torch.empty(0, device=device).device  # with its index: the masks are found by the tensors' own
            kernels.prepare_compiled_attention(op.sizes[1], [op.sizes[5]], where)
        return torch.compile(function, dynamic=False)


TRITON = Provider("triton", "triton", OPS | FUSED)
CPU = Provider("cpu", "cpu")  # the forms of kernels/cpu
EAGER, COMPILE = Provider("eager", "reference"), Provider("compile", "compile")


def liger() -> dict[str, Function]:
    """Liger-Kernel. RMSNorm: the λ-mix in PyTorch before it, the stream beside it; its backward writes over the
    gradient it is given, by default. MLP: relu² alone is its, the products PyTorch's. Loss: all of it, dW summed in
    fp32; it ignores a target by the same number."""
    rms_norm = import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction.apply
    relu2 = import_module("liger_kernel.ops.relu_squared").LigerReLUSquaredFunction.apply
    loss = import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy

    def norm(s):
        return rms_norm(s, None, EPS)

    def linear_cross_entropy(x, weight, *, targets):
        return loss(x, weight, targets, ignore_index=IGNORED, softcap=SOFTCAP, accum_dtype=torch.float32)

    return {
        "rms_norm": partial(mixed_norm, norm),
        "relu2_mlp": lambda x, w_fc, w_proj, residual: residual + F.linear(relu2(F.linear(x, w_fc)), w_proj),
        "linear_cross_entropy": linear_cross_entropy,
    }


def quack() -> dict[str, Function]:
    """QuACK. RMSNorm: the λ-mix in PyTorch before it, the stream beside it. Linear, QKV and MLP: its GEMMs with relu²
    in the epilogues; the residual and the value gate in PyTorch. Loss: it knows no softcap, so the product and the
    softcap are PyTorch's and keep the logits of all rows; the cross-entropy alone is its."""
    rms_norm = import_module("quack.rmsnorm").rmsnorm
    product = import_module("quack.linear").linear_func
    block = import_module("quack.mlp").mlp_func
    cross_entropy = import_module("quack.cross_entropy").cross_entropy

    def linear(x, weight, residual=None):
        y = product(x, weight)
        return y if residual is None else residual + y

    def qkv_projection(x, weight, gate_weight=None):
        return [product(x, weight), *([] if gate_weight is None else [x[..., : gate_weight.shape[1]] @ gate_weight.mT])]

    def linear_cross_entropy(x, weight, *, targets):
        return cross_entropy(kernels.softcapped_logits(x, weight), targets, ignore_index=IGNORED, reduction="mean")

    return {
        "rms_norm": partial(mixed_norm, partial(rms_norm, eps=EPS)),
        "linear": linear,
        "qkv_projection": qkv_projection,
        "relu2_mlp": lambda x, w_fc, w_proj, residual: residual + block(x, w_fc, w_proj, activation="relu_sq"),
        "linear_cross_entropy": linear_cross_entropy,
    }


def mixed_norm(norm: Callable, x, x0=None, lambda_r=None, lambda_0=None):
    """A plain norm as our op: the stream, mixed in PyTorch, its norm, and x0 as it came."""
    s = x if x0 is None else lambda_r * x + lambda_0 * x0
    return (s, norm(s), *([] if x0 is None else [x0]))


def flash_attention(module: str) -> dict[str, Function]:
    """FlashAttention, 2 or 3 by its module. Rotary, QK-norm, key offset and value embedding around it are the
    reference's, compiled: as a user of it would have them."""
    attend = import_module(module).flash_attn_func

    def window_attention(q, k, v, window):
        out = attend(q, k, v, causal=True, window_size=(window, 0))
        return out[0] if isinstance(out, tuple) else out  # some builds return the log-sum-exp as well

    @cache
    def compiled():
        return torch.compile(rotary_attention_ref, dynamic=False)

    def rotary_attention(qkv, ve=None, gate=None, *, cos, sin, num_heads, window, key_offset=False):
        return compiled()(qkv, cos, sin, num_heads, window, ve, gate, window_attention, key_offset)

    return {"rotary_attention": rotary_attention}


# Name, module whose presence tells, its ops, and how to get it.
PEERS = (
    ("liger", "liger_kernel", liger, install_line("--no-deps", "liger-kernel")),
    ("quack", "quack", quack, install_line("quack-kernels")),
    ("flash-attn-2", "flash_attn", partial(flash_attention, "flash_attn"),
     install_line("--no-build-isolation", "flash-attn")),
    ("flash-attn-3", "flash_attn_interface", partial(flash_attention, "flash_attn_interface"),
     "build hopper/ of github.com/Dao-AILab/flash-attention"),
)  # fmt: skip


def providers(device: str) -> list[Provider]:
    """All there are, in the order of the table; what cannot run on `device` says why in `missing`."""
    if device != "cuda":
        names = ", ".join(name for name, *_ in PEERS)
        return [
            CPU,
            EAGER,
            replace(TRITON, missing="the kernels need a CUDA device"),
            replace(COMPILE, missing="compiling every op takes a CPU minutes: on a CUDA device"),
            Provider(names, "reference", {}, missing="their kernels need a CUDA device"),
        ]
    found = [TRITON, EAGER, COMPILE]
    for name, module, make, how in PEERS:
        if find_spec(module) is None:
            found.append(Provider(name, "reference", {}, missing=f"not installed: {how}"))
            continue
        try:
            found.append(Provider(name, "reference", make()))
        except Exception as error:  # another version, or one that this GPU cannot load
            reason = f"its interface is not the one expected ({type(error).__name__}: {str(error).splitlines()[:1]})"
            found.append(Provider(name, "reference", {}, missing=reason))
    return found


def assert_right(provider: Provider, op: Op, direction: str, device: str, dtype: torch.dtype) -> None:
    """What a provider computes, gradients included where the direction is "both", against the reference in fp64.

    Raises:
        AssertionError: which result is wrong, and by how much. No time is to be reported then.
    """
    problem, truth_problem = truth_of(op, device, dtype)
    run = forward_backward if direction == "both" else forward
    with provider.active():
        got = run(provider.function(problem.op, device), problem)
    with EAGER.active():
        truth = run(TRUTHS[kind(op)], truth_problem)
    assert_close(op, got, truth, dtype)
