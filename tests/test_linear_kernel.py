"""The linear op's own autograd against the reference in fp64."""

import importlib

import pytest
import torch

from kernels.common import set_ops
from tests.kernel_checks import DEVICE, assert_as_good, fill_empty_with_nan, mutant, outputs_and_gradients
from tests.weight_grads import accumulated_gradients

op = importlib.import_module("kernels.linear")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DTYPES = [torch.float32, torch.float16]


@pytest.fixture(autouse=True)
def kernels_everywhere(monkeypatch):
    fill_empty_with_nan(monkeypatch)
    set_ops("triton")
    yield
    set_ops(None)


def make_inputs(rows, K, N, dtype, residual=True):
    generator = torch.Generator().manual_seed(0)
    shapes = [(*rows, K), (N, K), (*rows, N)]
    scales = [1.0, K**-0.5, 2.0]
    x, w, r = (s * torch.randn(shape, generator=generator) for shape, s in zip(shapes, scales, strict=True))
    inputs = [x, w, r] if residual else [x, w]
    return [t.to(DEVICE, dtype) for t in inputs]


def check(function, inputs, dtype, truth_dtype=torch.float64):
    runs = (outputs_and_gradients(f, inputs, d) for f, d in
            ((function, dtype), (op.linear_ref, dtype), (op.linear_ref, truth_dtype)))  # fmt: skip
    for index, values in enumerate(zip(*runs, strict=True)):
        assert_as_good(f"output or gradient {index}", *values)


def check_accumulation(function, inputs, dtype):
    runs = (accumulated_gradients(f, inputs, [1], d) for f, d in
            ((function, dtype), (op.linear_ref, dtype), (op.linear_ref, torch.float64)))  # fmt: skip
    for values in zip(*runs, strict=True):
        assert_as_good("main_grad", *values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
def test_outputs_and_gradients(residual, dtype):
    for rows, K, N in [((3, 17), 37, 53), ((1, 1), 5, 1), ((40,), 64, 4)]:
        check(op.linear, make_inputs(rows, K, N, dtype, residual), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_channels_of_a_wider_stream(dtype):
    wide, w = make_inputs((3, 17), 96, 4, dtype, residual=False)
    x, w = wide[..., :32], w[:, :32]
    check(op.linear, [x, w], dtype)
    assert x.reshape(-1, 32).data_ptr() == wide.data_ptr()  # the rows are evenly spaced: nothing is copied


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_add_up_in_main_grad(dtype):
    check_accumulation(op.linear, make_inputs((5, 13), 24, 40, dtype), dtype)


def test_gradients_that_nobody_wants_are_not_computed(monkeypatch):
    x, w, r = make_inputs((4,), 8, 8, torch.float32)
    monkeypatch.setattr(op, "weight_grad", None)
    op.linear(x.requires_grad_(), w, r).sum().backward()
    assert x.grad is not None


MUTANTS = {
    "the residual's gradient is lost": (("dy if needs_dresidual", "torch.zeros_like(dy) if needs_dresidual"),),
    "dx scaled": (("torch.mm(rows, weight)", "torch.mm(rows, weight).mul(0.999)"),),
    "the residual twice": (("residual.reshape(-1, N)", "2 * residual.reshape(-1, N)"),),
    "dW without its last row": (("weight_grad(rows, x,", "weight_grad(rows[:-1], x[:-1],"),),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail(name, tmp_path):
    wrong = mutant(op, *MUTANTS[name], folder=tmp_path)
    with pytest.raises(AssertionError):
        check(wrong.linear, make_inputs((3, 17), 37, 53, torch.float32), torch.float32)


def test_a_gradient_that_overwrites_fails(tmp_path):
    wrong = mutant(op, ("rows, x, ctx.main_grad)", "rows, x, ctx.main_grad.zero_())"), folder=tmp_path)
    with pytest.raises(AssertionError):
        check_accumulation(wrong.linear, make_inputs((5, 13), 24, 40, torch.float32), torch.float32)


def test_errors_name_the_argument():
    x, w, r = make_inputs((4,), 8, 6, torch.float32)
    with pytest.raises(ValueError, match="weight"):
        op.linear(x[:, :5], w)
    with pytest.raises(ValueError, match="residual"):
        op.linear(x, w, r[:2])
    with pytest.raises(ValueError, match="dtype"):
        op.linear(x, w.half())


def test_cost_counts_every_tensor_once():
    assert op.cost(10, 32, 64) == (2 * (10 * 96 + 32 * 64), 2 * 10 * 32 * 64)
    assert op.cost(10, 32, 64, residual=True)[0] == 2 * (10 * 160 + 32 * 64)
    assert op.cost(10, 32, 64, backward=True) == (4 * 10 * 96 + 10 * 32 * 64, 4 * 10 * 32 * 64)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize(("K", "N"), [(512, 1536), (512, 512), (32, 4)])
def test_bfloat16_at_the_models_shape(K, N):
    inputs = make_inputs((8, 2048), K, N, torch.bfloat16)
    check(op.linear, inputs, torch.bfloat16)
    check_accumulation(op.linear, inputs, torch.bfloat16)


@gpu
@pytest.mark.gpu
def test_weight_gradients_are_added_by_the_gemm():
    common = importlib.import_module("kernels.common")
    assert common._has_accumulating_gemm(torch.device("cuda:0"), torch.bfloat16)
