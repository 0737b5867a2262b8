"""RMSNorm's kernels against the reference in fp64."""

import importlib

import pytest
import torch

from kernels import chosen, key_of, layer_weight
from kernels.common import upcast
from tests.helpers.kernel_checks import (
    DEVICE,
    assert_as_good,
    compared,
    mutant,
    outputs_and_gradients,
    own_sizes,
    real_and_small,
)

pytestmark = pytest.mark.usefixtures("kernels_everywhere")
op = importlib.import_module("kernels.rms_norm")
PARTS = ["x", "x0"]


def make_inputs(shape, parts, dtype, seed=0):
    """Inputs that `dtype` holds exactly; rows of very different size, one of them zero."""
    generator = torch.Generator().manual_seed(seed)

    def tensor():
        t = torch.randn(shape, generator=generator)
        t = t * torch.logspace(-3, 1, shape[-2])[:, None]
        if shape[-2] > 1:
            t[..., 0, :] = 0
        return t.to(DEVICE, dtype)

    if parts == "x":
        return [tensor()]
    return [tensor(), tensor(), torch.tensor(1.25, device=DEVICE), torch.tensor(-0.375, device=DEVICE)]


def with_scalars(function):
    """In fp32 at least, whatever the dtype of the rest."""

    def call(x, *mixed):
        return function(x, *(upcast(value) if value.dim() == 0 else value for value in mixed))

    return call


def check(function, shape, parts, dtype, reference=op.rms_norm_ref, draws=1, inputs=None):
    given = [make_inputs(shape, parts, dtype, seed) if inputs is None else inputs for seed in range(draws)]
    for index, values in enumerate(compared(with_scalars(function), with_scalars(reference), given, dtype)):
        number = values[2].dim() == 1  # dλ, of another size in each draw
        sizes = own_sizes(values[2]) if number else None
        assert_as_good(f"output or gradient {index} of {parts}", *values, sizes=sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("parts", PARTS)
def test_outputs_and_gradients(parts, dtype):
    draws = 8 if parts == "x0" else 1
    check(op.rms_norm, (5, 9, 300), parts, dtype, draws=draws)  # several programs, the last one partly filled
    check(op.rms_norm, (3, 7, 37), parts, dtype, draws=draws)


@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (1, 1025)])
def test_sizes_of_one(shape):
    check(op.rms_norm, shape, "x0", torch.float32, draws=32)  # one number each: their spread compares


@real_and_small("rows, dtype", [(32768, torch.bfloat16)], [(6, torch.float32)])
def test_strided_rows(rows, dtype):
    inputs = make_inputs((rows, 80), "x0", dtype)
    inputs[:2] = [t[:, 7:50] for t in inputs[:2]]
    check(op.rms_norm, (rows, 43), "x0", dtype, inputs=inputs)


@pytest.mark.parametrize("only", ["s", "y"])
@pytest.mark.parametrize("parts", PARTS)
def test_one_gradient_may_be_absent(parts, only):
    def one(function):
        return lambda *inputs: function(*inputs)[only == "y"]

    check(one(op.rms_norm), (3, 5, 24), parts, torch.float32, reference=one(op.rms_norm_ref), draws=8)


def test_x0_goes_through_layer_after_layer():
    """Each adds its part of dx0 to what the next sent back, a last one that nobody reads included."""
    first, x0, *lambdas = make_inputs((4, 9, 40), "x0", torch.float32)

    def three_layers(mix):
        def function(x, x0, lambda_r, lambda_0):
            for _ in range(3):
                x, y, x0 = mix(x, x0, upcast(lambda_r), upcast(lambda_0))
            return x, y

        return function

    functions = three_layers(op.rms_norm), three_layers(op.rms_norm_ref)
    results = compared(*functions, [[first, x0, *lambdas]], torch.float32)
    for name, values in zip(("x", "y", "dx", "dx0"), results, strict=False):
        assert_as_good(name, *values)

    x0.requires_grad_()
    alone = op.rms_norm(first, x0, *lambdas)[2]
    assert alone.data_ptr() == x0.data_ptr()
    (dx0,) = torch.autograd.grad(alone, x0, torch.full_like(x0, 3.0))
    assert (dx0 == 3.0).all()


def test_lambda_gradients_add_up_in_main_grad():
    x, x0, *_ = make_inputs((4, 9, 40), "x0", torch.float32)
    lambdas = [torch.tensor([0.5, 1.5], device=DEVICE, requires_grad=True) for _ in range(2)]
    truth = [value.detach().double().requires_grad_() for value in lambdas]
    for value in lambdas:
        value.main_grad = torch.tensor([3.0, -2.0], device=DEVICE)
    for scale in (1.0, 0.5):
        _, y, _ = op.rms_norm(x, x0, *(layer_weight(v, 1) for v in lambdas))
        (scale * y[..., 3]).sum().backward()
        _, y, _ = op.rms_norm_ref(x.double(), x0.double(), *(v[1] for v in truth))
        (scale * y[..., 3]).sum().backward()
    for value, exact in zip(lambdas, truth, strict=True):
        assert value.grad is None
        assert value.main_grad[0] == 3.0
        torch.testing.assert_close(value.main_grad[1].double(), exact.grad[1] - 2.0, rtol=1e-5, atol=1e-5)


# Of rows in five parts, the last of which is not full: that of the first cases here.
MUTANTS = {
    "the mean of squares forgets its tail": (("/ D + EPS", "/ (PARTS * BLOCK_D) + EPS"),),
    "no projection": (("- normed[part] * along", ""),),
    "the projection is not divided": (("axis=1)[:, None] / D", "axis=1)[:, None]"),),
    "the stream's gradient is lost": (("g_part += _load(ds_ptr", "_load(ds_ptr"),),
    "what comes back for x0 is lost": (("dx0 += _load(dx0_later_ptr", "_load(dx0_later_ptr"),),
    "dx unscaled": (("(tl.load(lambda_r_ptr) * g[part])", "g[part]"),),
    "dλr from the normed stream": (("_products(g, x))", "_products(g, normed))"),),
    "the mean of squares is the first part's": (("_products(s, s)", "_products(s[:1], s[:1])"),),
    "the projection is on the first part": (("_products(dy, normed)", "_products(dy[:1], normed[:1])"),),
    "dλ0 is the first part's": (("_products(g, x0)", "_products(g[:1], x0[:1])"),),
    "the second part is left out of every sum": (("static_range(1, len(a))", "static_range(2, len(a))"),),
    "the last part is left out of every sum": (("static_range(1, len(a))", "static_range(1, len(a) - 1)"),),
    "parts lie over each other": (("part * BLOCK_D +", "part * (BLOCK_D // 2) +"),),
    "every part is masked as the first": (("(offs_d < D)", "(tl.arange(0, BLOCK_D) < D)"),),
    "a row's last element is masked off": (("(offs_d < D)", "(offs_d < D - 1)"),),
    "what lies past a row counts": (("mask=mask, other=0.0).to", "mask=mask, other=0.1).to"),),
    "one program's dλ is left out": (("for start in range(0, N, BLOCK)", "for start in range(0, N - 1, BLOCK)"),
                                     ("BLOCK=1024", "BLOCK=1")),
    "the last row is not written": (("mask_m = offs_m < M\n    s =", "mask_m = offs_m < M - 1\n    s ="),),
}  # fmt: skip


def as_wide(D: int, block_d: int, dtype: torch.dtype):
    """Inside, rows of D are in parts as wide as that."""
    tile = {"BLOCK_M": 2, "BLOCK_D": block_d, "num_warps": 4}
    table = {choice.name: {key_of((D, dtype)): tile} for choice in op.FORWARD.values()}
    table |= {choice.name: {key_of((D, dtype)): {**tile, "STEPS": 2}} for choice in op.BACKWARD.values()}
    return chosen(table)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize(("D", "block_d", "dtype"), [
    (80, 128, torch.float32), (80, 16, torch.float32), (80, 16, torch.bfloat16), (160, 32, torch.float32),
    (90, 16, torch.float32), (112, 16, torch.float32),
])  # fmt: skip
def test_a_row_in_one_part_or_in_several(D, block_d, parts, dtype):
    with as_wide(D, block_d, dtype):
        check(op.rms_norm, (5, D), parts, dtype, draws=8 if parts == "x0" else 1)


@pytest.mark.parametrize("block_d", [1024, 128])
def test_the_width_of_five_heads_of_128(block_d):
    with as_wide(640, block_d, torch.float32):
        check(op.rms_norm, (3, 640), "x0", torch.float32, draws=8)


def test_what_a_row_is_by_default_and_what_is_tried():
    """One part, but where five eighths of the next power of two hold it."""
    for D, width in ((512, 512), (1024, 1024), (768, 1024), (896, 1024), (641, 1024), (640, 128), (576, 128),
                     (300, 64), (80, 16), (40, 64)):  # fmt: skip
        assert op._config(D)["BLOCK_D"] == width
    for D, widths in ((512, {512}), (640, {1024, 128}), (768, {1024, 128}), (40, {64})):
        for choice in (*op.FORWARD.values(), *op.BACKWARD.values()):
            tiles = choice.candidates(D, torch.bfloat16)
            assert {tile["BLOCK_D"] for tile in tiles} == widths
            assert len(tiles) <= 32


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail(name, tmp_path):
    wrong = mutant(op, *MUTANTS[name], folder=tmp_path)
    with pytest.raises(AssertionError):
        check(wrong.rms_norm, (5, 9, 300), "x0", torch.float32)


def test_errors_name_the_argument():
    x = torch.randn(4, 8, device=DEVICE)
    one = torch.ones((), device=DEVICE)
    for wrong in (x[:2], x.half()):
        with pytest.raises(ValueError, match="x0"):
            op.rms_norm(x, wrong, one, one)
    with pytest.raises(ValueError, match="lambda_0"):
        op.rms_norm(x, x, one)
    with pytest.raises(ValueError, match="stride"):
        op.rms_norm(x.T)
    with pytest.raises(ValueError, match="float64"):
        op.rms_norm(x.double())


def test_eps_is_the_machines():
    assert torch.finfo(torch.float32).eps == op.EPS


def test_cost_counts_every_tensor_once():
    assert op.cost(10, 512) == (10 * (512 * 2 * 2 + 4), 10 * 512 * 4)  # x, y and rstd
    assert op.cost(10, 512, has_x0=True) == (10 * (512 * 4 * 2 + 4), 10 * 512 * 7)  # x, x0, s, y
    for left_out in ("has_s", "has_y"):
        assert op.cost(10, 512, has_x0=True, **{left_out: False})[0] == 10 * (512 * 3 * 2 + 4)
    mixed = op.cost(10, 512, has_x0=True, backward=True)
    assert mixed[0] == 10 * (512 * 7 * 2 + 4)  # ds, dy, x, x0, dx, dx0 as read and written; rstd


@real_and_small("shape", [(16, 2048, 512), (4, 2048, 640), (2, 2048, 1280), (1, 1, 512)], [(2, 9, 40), (1, 1, 8)])
@pytest.mark.parametrize("parts", PARTS)
def test_bfloat16(parts, shape):
    check(op.rms_norm, shape, parts, torch.bfloat16, draws=8 if parts == "x0" else 1)


@real_and_small("shape", [(2048, 512)], [(9, 40)])
def test_heavy_tails_in_bfloat16(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).pow(5).to(DEVICE, torch.bfloat16)
    check(op.rms_norm, shape, "x", torch.bfloat16, inputs=[x])


@real_and_small("shape", [(16, 2048, 512), (16, 2048, 640)], [(4, 9, 40), (4, 9, 80)])
def test_the_same_bits_twice(shape):
    inputs = make_inputs(shape, "x0", torch.bfloat16)
    runs = [outputs_and_gradients(with_scalars(op.rms_norm), inputs, torch.bfloat16) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@real_and_small("shape", [(2**20 + 8, 2048)], [(40, 24)])
def test_past_two_to_the_31_elements(shape):
    x = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    _, y = op.rms_norm(x)
    dy = torch.randn(8, shape[1], device=DEVICE, dtype=torch.bfloat16)
    y[-8:].backward(dy)
    last = x.detach()[-8:].clone().requires_grad_()
    _, expected = op.rms_norm(last)
    expected.backward(dy)
    assert torch.equal(y[-8:], expected)
    assert torch.equal(x.grad[-8:], last.grad)
    assert not x.grad[:-8].any()
