"""How a kernel is judged: against a truth in higher precision, by what the reference may err by in the same dtype."""

import importlib.util
import linecache
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.roundings import Roundings

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# A GPU's exp2, log2, rsqrt, sqrt and division err by up to 2⁻²² of their result, two units in fp32's last place (PTX
# ISA), and up to four of them lie behind a number. PyTorch's own operations there take exact ones.
APPROXIMATIONS = 4 * 2.0**-22 if DEVICE == "cuda" else 0.0
# Tiles for a product of matrices under which small shapes have many, with tails in every direction.
SMALL_GEMM = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}
DRAWS = 3  # of the signs of roundings: where some cancel in one, they do not in another


def real_and_small(names: str, real: Sequence, small: Sequence) -> pytest.MarkDecorator:
    """Parametrizes `names`, "a" or "a, b", by real values, which need a GPU, and by small ones that the interpreter
    takes too: they show that the body of a test that no GPU has run yet is itself sound."""
    several = "," in names

    def case(values, *marks):
        return pytest.param(*(values if several else [values]), marks=marks)

    return pytest.mark.parametrize(names, [case(v, pytest.mark.gpu) for v in real] + [case(v) for v in small])


def worst_errors(value: Tensor, truth: Tensor) -> tuple[float, float]:
    """Largest and root-mean-square difference, taken in fp64."""
    difference = (value.double() - truth.double()).abs()
    return difference.max().item(), difference.square().mean().sqrt().item()


def baselines(reference: Callable[[torch.dtype], Any], dtype: torch.dtype = torch.float32) -> list:
    """What errs as `reference` may in `dtype`: in 16 bits the reference itself, in fp32 draws of its `Roundings`, since
    there its own error depends on the machine."""
    if dtype != torch.float32:
        return [reference(dtype)]
    found = []
    for draw in range(DRAWS):
        with Roundings(1000 * draw):
            found.append(reference(torch.float64))
    return found


def assert_as_good(
    name: str, value: Tensor, baseline: Sequence[Tensor], truth: Tensor, sizes: Tensor | None = None,
    method: float = 0.0,
) -> None:  # fmt: skip
    """Max and RMS error of `value` are at most twice the largest of `baseline`, plus one rounding of the truth; in fp32
    on a GPU, plus what its instructions approximate.

    `baseline` is what `baselines` gives of the reference, `truth` the reference in fp64. `sizes` divide all of them,
    for numbers of very different size, among which the largest alone would make the largest error (`own_sizes`).
    `method` is what an op's way of computing costs in fp32, of the truth's size.
    """
    assert value.shape == truth.shape, f"{name}: shape {tuple(value.shape)}, expected {tuple(truth.shape)}"
    assert torch.isfinite(value).all(), f"{name}: not finite"
    assert truth.any(), f"{name}: zeros are right where nothing was computed"
    inexact = APPROXIMATIONS + method if value.dtype == torch.float32 else 0.0
    eps = torch.finfo(value.dtype).eps
    if sizes is not None:
        value, truth, *baseline = (t.to(sizes.dtype) / sizes for t in (value, truth, *baseline))
    allowances = [max(errors) for errors in zip(*(worst_errors(b, truth) for b in baseline), strict=True)]
    largest, rms = worst_errors(truth, torch.zeros_like(truth))
    errors = zip(("max", "rms"), worst_errors(value, truth), allowances, (largest, rms), strict=True)
    for kind, got, allowed, size in errors:
        limit = 2 * allowed + eps * rms + inexact * size
        assert got <= limit, f"{name}: {kind} error {got:.3e} above {limit:.3e} (2 x {allowed:.3e})"


def own_sizes(truth: Tensor) -> Tensor:
    """Of each number its own, or their RMS where that is larger."""
    return truth.abs().clamp_min(truth.square().mean().sqrt() + 1e-30)


def outputs_and_gradients(
    op: Callable[..., Tensor | Sequence[Tensor]], inputs: Sequence[Tensor | None], dtype: torch.dtype, seed: int = 1
) -> list[Tensor]:
    """Outputs of `op` on the inputs in `dtype`, then the gradient of every floating input under a random cotangent.

    Integer inputs and None pass through. The cotangent depends on seed and shape only, and bf16 holds it exactly: all
    dtypes see the same one, and none is excused by having rounded it.
    """
    cast = [
        x.detach().to(dtype).requires_grad_() if x is not None and x.is_floating_point() else x for x in inputs
    ]
    out = op(*cast)
    outs = [out] if isinstance(out, Tensor) else [o for o in out if o is not None]
    generator = torch.Generator(outs[0].device).manual_seed(seed)
    cotangents = [
        torch.randn(o.shape, generator=generator, dtype=torch.float32, device=o.device).bfloat16().to(o.dtype)
        for o in outs
    ]
    leaves = [x for x in cast if x is not None and x.requires_grad]
    gradients = torch.autograd.grad(outs, leaves, cotangents)
    return [*(o.detach() for o in outs), *gradients]


def compared(
    op: Callable, reference: Callable, draws: Iterable[Sequence[Tensor | None]], dtype: torch.dtype
) -> Iterator[tuple[Tensor, list[Tensor], Tensor]]:
    """Each output and each gradient, for `assert_as_good`: of `op` and of `reference` in `dtype`, then of the latter in
    fp64. `draws` are inputs; what they give stands together, since of a single number the error is luck."""
    draws = list(draws)

    def results(function, dtype):
        runs = [outputs_and_gradients(function, inputs, dtype, seed) for seed, inputs in enumerate(draws)]
        return [torch.stack(parts) for parts in zip(*runs, strict=True)]

    baseline = baselines(lambda dtype: results(reference, dtype), dtype)
    return zip(results(op, dtype), transposed(baseline), results(reference, torch.float64), strict=True)


def transposed(runs: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """Of each result what each run gave."""
    return [list(results) for results in zip(*runs, strict=True)]


def fill_empty_with_nan(monkeypatch) -> None:
    """Every floating tensor that comes from `empty` is full of NaN: what a kernel forgot to write then shows."""

    def filled(empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapper(*args, **kwargs):
            out = empty(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return wrapper

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))


def mutant(module: ModuleType, *edits: tuple[str, str], folder: Path) -> ModuleType:
    """A copy of `module` in which each `(old, new)` has been replaced: a check that accepts it checks nothing.

    Args:
        module: an op's file.
        edits: what to replace, every `old` exactly once in the source as it then stands.
        folder: where the copy is written; Triton reads a kernel's source from its file.
    """
    source = Path(module.__file__).read_text(encoding="utf-8")
    for old, new in edits:
        assert source.count(old) == 1, f"{old!r} is {source.count(old)} times in {module.__file__}"
        source = source.replace(old, new)
    name = f"{module.__name__.rpartition('.')[2]}_mutant"
    path = folder / f"{name}.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"{module.__package__}.{name}", path)
    copy = importlib.util.module_from_spec(spec)
    linecache.checkcache(str(path))  # two mutants in one folder share a path
    spec.loader.exec_module(copy)
    return copy


def exact_bfloat16(monkeypatch) -> None:
    """Makes bf16 in Triton's interpreter behave as on a GPU: it multiplies the raw bits in `tl.dot`, and truncates
    where a GPU rounds to nearest even. Does nothing where kernels are compiled. Written against the pinned Triton."""
    if DEVICE == "cuda":
        return
    import triton.language as tl
    from triton.runtime import interpreter

    create_dot, convert = interpreter.InterpreterBuilder.create_dot, interpreter._convert_float

    def upcast(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.view(np.uint16).astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def exact_dot(self, a, b, d, *args):
        return create_dot(self, upcast(a), upcast(b), d, *args)

    def rounded(data, source, target, mode):
        if source != tl.float32 or target != tl.bfloat16:
            return convert(data, source, target, mode)
        bits = np.ascontiguousarray(data).view(np.uint32).astype(np.uint64)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(data), np.uint16(0x7FC0), nearest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", exact_dot)
    monkeypatch.setattr(interpreter, "_convert_float", rounded)
