"""What the tests of attention's kernels share: inputs, the check of an op against the reference, wrong kernels."""

import inspect
import math
from pathlib import Path

import torch

from kernels.common import triton
from kernels.rotary_attention import rotary_attention, rotary_attention_ref, rotary_tables
from tests.helpers.kernel_checks import DEVICE, assert_as_good, compared


def random_inputs(B, T, H, KVH, head_dim, has_ve, seed=0):
    """qkv, ve, gate in fp64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE)

    qkv = draw(B, T, (H + 2 * KVH) * head_dim)
    return [qkv, draw(B, T, KVH * head_dim), draw(B, T, KVH)] if has_ve else [qkv, None, None]


def check(inputs, H, window, head_dim, dtype, op=rotary_attention, draws=1, **options):
    """Output and every gradient of `op` in `dtype`, as good as the reference's in the same dtype, both with `options`.

    Inputs of 16 bits are rounded first: that error is nobody's. `draws` are of the cotangent. The backward has a weight
    from its exponent and a log-sum-exp of up to log₂(e)·√head_dim: rounded to fp32, that is √head_dim·2⁻²⁴ of it, where
    PyTorch has a lone key's weight of 1 without error.
    """
    cos, sin = rotary_tables(inputs[0].shape[1], head_dim, device=DEVICE)
    if dtype.itemsize == 2:
        inputs = [None if x is None else x.to(dtype) for x in inputs]
    functions = [
        lambda qkv, ve, gate, f=f: f(qkv, cos, sin, H, window, ve, gate, **options) for f in (op, rotary_attention_ref)
    ]
    results = compared(*functions, [inputs] * draws, dtype)
    for name, values in zip(("out", "dqkv", "dve", "dgate"), results, strict=False):
        assert_as_good(name, *values, method=0.0 if name == "out" else math.sqrt(head_dim) * 2.0**-24)


def mutated(kernel, old: str, new: str, path: Path):
    """A jitted function with one piece of its source replaced."""
    source = inspect.getsource(kernel.fn)
    assert source.count(old) >= 1, f"{old!r} is not in {kernel.fn.__name__}"
    path.write_text(source.replace(old, new))
    scope = {}
    exec(compile(path.read_text(), str(path), "exec"), kernel.fn.__globals__ | {"triton": triton}, scope)
    return scope[kernel.fn.__name__]
