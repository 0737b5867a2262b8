"""How a kernel is judged: against a truth in higher precision, by PyTorch's own error in the same dtype."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def worst_errors(value: Tensor, truth: Tensor) -> tuple[float, float]:
    """Largest and root-mean-square difference, taken in fp64."""
    difference = (value.double() - truth.double()).abs()
    return difference.max().item(), difference.square().mean().sqrt().item()


def assert_as_good(name: str, value: Tensor, baseline: Tensor, truth: Tensor, factor: float = 2.0) -> None:
    """Max and RMS error of `value` are at most `factor` times those of `baseline`, plus one rounding of the truth.

    `baseline` is the reference in the dtype under test, `truth` the reference in fp64.
    """
    assert value.shape == truth.shape, f"{name}: shape {tuple(value.shape)}, expected {tuple(truth.shape)}"
    assert torch.isfinite(value).all(), f"{name}: not finite"
    eps = torch.finfo(baseline.dtype).eps
    rms = truth.double().square().mean().sqrt().item()
    for kind, got, allowed in zip(
        ("max", "rms"), worst_errors(value, truth), worst_errors(baseline, truth), strict=True
    ):
        limit = factor * allowed + eps * rms
        assert got <= limit, f"{name}: {kind} error {got:.3e} above {limit:.3e} ({factor} x PyTorch's {allowed:.3e})"


def outputs_and_gradients(
    op: Callable[..., Tensor | Sequence[Tensor]], inputs: Sequence[Tensor | None], dtype: torch.dtype, seed: int = 1
) -> list[Tensor]:
    """Outputs of `op` on the inputs in `dtype`, then the gradient of every floating input under a random cotangent.

    Integer inputs and None pass through. The cotangent depends on seed and shape only: all dtypes see the same one.
    """
    cast = [
        x.detach().to(dtype).requires_grad_() if x is not None and x.is_floating_point() else x for x in inputs
    ]
    out = op(*cast)
    outs = [out] if isinstance(out, Tensor) else [o for o in out if o is not None]
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device, o.dtype) for o in outs]
    leaves = [x for x in cast if x is not None and x.requires_grad]
    gradients = torch.autograd.grad(outs, leaves, cotangents)
    return [*(o.detach() for o in outs), *gradients]
