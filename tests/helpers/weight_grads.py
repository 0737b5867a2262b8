"""Gradients of weights as a training step sums them: over micro-steps, into fp32 tensors beside the parameters."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels import layer_weight
from tests.helpers.kernel_checks import assert_as_good, baselines, transposed


def accumulated_gradients(
    op: Callable[..., Tensor], inputs: Sequence[Tensor | None], weights: Sequence[int], dtype: torch.dtype
) -> list[Tensor]:
    """`main_grad` of the inputs at the positions `weights` after two backward calls, each of another cotangent.

    They start at 0.5, so that an op that writes where it should add is found out.
    """
    inputs = [x.detach().to(dtype) if x is not None and x.is_floating_point() else x for x in inputs]
    for i in weights:
        inputs[i].requires_grad_()
        inputs[i].main_grad = torch.full(
            inputs[i].shape, 0.5, dtype=torch.promote_types(dtype, torch.float32), device=inputs[i].device
        )
    generator = torch.Generator(inputs[0].device).manual_seed(5)
    for _ in range(2):
        out = op(*(layer_weight(x) if i in weights else x for i, x in enumerate(inputs)))
        cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float32, device=out.device) + 0.5
        out.backward(cotangent.bfloat16().to(out.dtype))  # what every dtype holds exactly
    assert all(inputs[i].grad is None for i in weights)
    return [inputs[i].main_grad for i in weights]


def check_accumulation(
    op: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: Sequence[Tensor | None],
    weights: Sequence[int], dtype: torch.dtype,
) -> None:  # fmt: skip
    """Sums of `op` in `dtype`, judged by those of `reference` in `dtype` and in fp64."""
    got, truth = (accumulated_gradients(f, inputs, weights, d) for f, d in ((op, dtype), (reference, torch.float64)))
    baseline = transposed(baselines(lambda dtype: accumulated_gradients(reference, inputs, weights, dtype), dtype))
    for i, *values in zip(weights, got, baseline, truth, strict=True):
        assert_as_good(f"main_grad of input {i}", *values)
