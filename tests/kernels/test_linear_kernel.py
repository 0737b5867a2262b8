"""The products that the vendor multiplies, by their own autograd, against the references in fp64."""

import importlib

import pytest
import torch

from tests.helpers.kernel_checks import DEVICE, assert_as_good, compared, mutant, outputs_and_gradients, real_and_small
from tests.helpers.weight_grads import accumulated_gradients, check_accumulation

pytestmark = pytest.mark.usefixtures("kernels_everywhere")
op = importlib.import_module("kernels.linear")
projection = importlib.import_module("kernels.qkv_projection")
DTYPES = [torch.float32, torch.float16]


def make_inputs(rows, K, N, dtype, residual=True):
    generator = torch.Generator().manual_seed(0)
    sized = [((*rows, K), 1.0), ((N, K), K**-0.5), ((*rows, N), 2.0)]
    sized = sized if residual else sized[:2]
    return [(scale * torch.randn(shape, generator=generator)).to(DEVICE, dtype) for shape, scale in sized]


def check(function, inputs, dtype, reference=op.linear_ref):
    for index, values in enumerate(compared(function, reference, [inputs], dtype)):
        assert_as_good(f"output or gradient {index}", *values)


def projection_inputs(rows, channels, dtype, K=37, N=53):
    """x, W and W_gate of 16 heads: so many that a largest error is no luck."""
    generator = torch.Generator().manual_seed(2)
    shapes = [((*rows, K), 1.0), ((N, K), K**-0.5), ((16, channels), channels**-0.5)]
    return [(scale * torch.randn(shape, generator=generator)).to(DEVICE, dtype) for shape, scale in shapes]


def check_projection(function, inputs, dtype):
    check(function, inputs, dtype, reference=projection.qkv_projection_ref)
    both = [lambda *given, f=f: torch.cat(f(*given), -1) for f in (function, projection.qkv_projection_ref)]
    check_accumulation(*both, inputs, [1, 2], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
def test_outputs_and_gradients(residual, dtype):
    for rows, K, N in [((3, 17), 37, 53), ((1, 1), 5, 1), ((40,), 64, 4)]:
        check(op.linear, make_inputs(rows, K, N, dtype, residual), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_residual_may_become_the_result(dtype):
    def in_place(x, w, r):
        stream = 1 * r  # of the graph, as in the model: a leaf would refuse
        y = op.linear(x, w, stream, overwrite=True)
        assert y is stream, "whoever holds it holds the result, with its history"
        return y

    check(in_place, make_inputs((3, 17), 37, 53, dtype), dtype)
    x, w, r = make_inputs((4,), 8, 6, dtype)
    spread = torch.zeros(4, 12, dtype=dtype, device=DEVICE)[:, ::2].copy_(r)
    assert torch.equal(op.linear(x, w, spread, overwrite=True), op.linear(x, w, r))
    assert torch.equal(spread, r), "not contiguous, so it is left alone"
    kept = r.clone()
    op.linear(x, w, r)
    assert torch.equal(r, kept)


def test_an_overwritten_residual_is_refused_by_whoever_kept_it():
    x, w, r = make_inputs((4,), 8, 6, torch.float32)
    stream = r.requires_grad_().exp()  # keeps its result
    y = op.linear(x, w, stream, overwrite=True)
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()


@pytest.mark.parametrize("channels", [8, 37])
@pytest.mark.parametrize("dtype", DTYPES)
def test_qkv_and_gate(dtype, channels):
    for rows in [(3, 17), (1, 1)]:
        check_projection(projection.qkv_projection, projection_inputs(rows, channels, dtype), dtype)


def test_without_a_gate_it_is_one_product():
    x, w, _ = projection_inputs((3, 17), 8, torch.float32)
    qkv, gate = projection.qkv_projection(x, w)
    assert gate is None
    assert torch.equal(qkv, op.linear(x, w))


@pytest.mark.parametrize("only", [0, 1], ids=["qkv", "gate"])
def test_qkv_or_gate_alone_may_have_a_gradient(only):
    def gradients(function, dtype):
        inputs = [t.to(dtype).requires_grad_() for t in projection_inputs((3, 17), 8, torch.float32)]
        out = function(*inputs)[only]
        out.backward(torch.linspace(-1, 1, out.numel(), device=DEVICE, dtype=dtype).view_as(out))
        return [x.grad for x in inputs]

    for got, truth in zip(
        gradients(projection.qkv_projection, torch.float32),
        gradients(projection.qkv_projection_ref, torch.float64), strict=True,
    ):  # fmt: skip
        assert (got is None) == (truth is None)
        if truth is not None:
            torch.testing.assert_close(got, truth.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_add_up_in_main_grad(dtype):
    check_accumulation(op.linear, op.linear_ref, make_inputs((5, 13), 24, 40, dtype), [1], dtype)


def test_gradients_that_nobody_wants_are_not_computed(monkeypatch):
    x, w, r = make_inputs((4,), 8, 8, torch.float32)
    monkeypatch.setattr(op, "weight_grad", None)
    op.linear(x.requires_grad_(), w, r).sum().backward()
    assert x.grad is not None


MUTANTS = {
    "the residual's gradient is lost": (("dy if needs_dresidual", "torch.zeros_like(dy) if needs_dresidual"),),
    "dx scaled": (("product(rows, weight)", "product(rows, weight).mul(0.999)"),),
    "the residual twice": (("residual.reshape(-1, N)", "2 * residual.reshape(-1, N)"),),
    "dW without its last row": (("weight_grad(rows, x,", "weight_grad(rows[:-1], x[:-1],"),),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail(name, tmp_path):
    wrong = mutant(op, *MUTANTS[name], folder=tmp_path)
    with pytest.raises(AssertionError):
        check(wrong.linear, make_inputs((3, 17), 37, 53, torch.float32), torch.float32)


PROJECTION_MUTANTS = {
    "the gate's dx is lost": (("dx[:, :channels].addmm_(dgate, gate_weight)", "pass"),),
    "the gate's dx replaces qkv's": (("dx[:, :channels].addmm_(", "dx[:, :channels].zero_().addmm_("),),
    "the gate reads other channels": (("rows[:, : gate_weight.shape[1]]", "rows[:, -gate_weight.shape[1] :]"),),
    "the gate's dW from other channels": (("x[:, :channels], main", "x[:, -channels:], main"),),
    "dW without its last row": (("weight_grad(dqkv, x,", "weight_grad(dqkv[:-1], x[:-1],"),),
}


@pytest.mark.parametrize("name", PROJECTION_MUTANTS)
def test_projection_mutants_fail(name, tmp_path):
    wrong = mutant(projection, *PROJECTION_MUTANTS[name], folder=tmp_path)
    with pytest.raises(AssertionError):
        check_projection(wrong.qkv_projection, projection_inputs((3, 17), 8, torch.float32), torch.float32)


def test_a_gradient_that_overwrites_fails(tmp_path):
    wrong = mutant(op, ("rows, x, ctx.main_grad)", "rows, x, ctx.main_grad.zero_())"), folder=tmp_path)
    with pytest.raises(AssertionError):
        check_accumulation(wrong.linear, op.linear_ref, make_inputs((5, 13), 24, 40, torch.float32), [1], torch.float32)


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


REAL = [((8, 2048), 512, 1536), ((8, 2048), 512, 512), ((8, 2048), 32, 4), ((3, 333), 500, 100), ((1, 1), 512, 1536)]


@real_and_small("rows, K, N", REAL, [((3, 17), 37, 53), ((1, 1), 32, 4)])
def test_bfloat16(rows, K, N):
    inputs = make_inputs(rows, K, N, torch.bfloat16)
    check(op.linear, inputs, torch.bfloat16)
    check_accumulation(op.linear, op.linear_ref, inputs, [1], torch.bfloat16)


@real_and_small("rows, K, N", [((8, 2048), 512, 1536), ((3, 333), 500, 100)], [((3, 17), 37, 53)])
def test_qkv_and_gate_in_bfloat16(rows, K, N):
    check_projection(projection.qkv_projection, projection_inputs(rows, 32, torch.bfloat16, K, N), torch.bfloat16)


@real_and_small("rows, width, K", [((8, 2048), 512, 32)], [((3, 17), 96, 32)])
def test_strided_rows_in_bfloat16(rows, width, K):
    wide, w = make_inputs(rows, width, 4, torch.bfloat16, residual=False)
    check(op.linear, [wide[..., 8 : 8 + K], w[:, :K]], torch.bfloat16)


@real_and_small("rows, K, N", [((8, 2048), 512, 1536)], [((3, 17), 37, 53)])
def test_heavy_tails_in_bfloat16(rows, K, N):
    x, w, r = make_inputs(rows, K, N, torch.bfloat16)
    check(op.linear, [x.float().pow(5).bfloat16(), w, r], torch.bfloat16)


@real_and_small("rows, K, N", [((8, 2048), 512, 512)], [((3, 17), 37, 53)])
def test_the_same_bits_twice(rows, K, N):
    inputs, dtype = make_inputs(rows, K, N, torch.bfloat16), torch.bfloat16
    runs = [
        outputs_and_gradients(op.linear, inputs, dtype) + accumulated_gradients(op.linear, inputs, [1], dtype)
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@real_and_small("rows", [2**20 + 8], [40])
def test_past_two_to_the_31_elements(rows):
    x, w = make_inputs((rows,), 16, 2048 if rows > 2**20 else 24, torch.bfloat16, residual=False)
    y = op.linear(x.requires_grad_(), w)
    dy = torch.zeros_like(y)
    dy[-8:] = torch.randn_like(dy[-8:])
    (dx,) = torch.autograd.grad(y, x, dy)
    truth, dx_truth = (f(t[-8:].double(), w.double()) for f, t in ((op.linear_ref, x), (lambda d, w: d @ w, dy)))
    assert_as_good("y", y[-8:], [truth.bfloat16()], truth)
    assert_as_good("dx", dx[-8:], [dx_truth.bfloat16()], dx_truth)
    assert not dx[:-8].any()


@pytest.mark.gpu
def test_weight_gradients_are_added_by_the_gemm():
    weight_grad = importlib.import_module("kernels.weight_grad")
    assert weight_grad._has_accumulating_gemm(torch.device("cuda:0"), torch.bfloat16)
