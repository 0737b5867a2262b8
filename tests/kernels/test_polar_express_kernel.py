"""Polar Express's kernels against the reference in fp64."""

import importlib

import pytest
import torch

from tests.helpers.kernel_checks import DEVICE, assert_as_good, baselines, mutant, real_and_small

pytestmark = pytest.mark.usefixtures("kernels_everywhere")
op = importlib.import_module("kernels.polar_express")
SHAPES = [(2, 4, 32), (1, 37, 37), (2, 70, 131), (2, 131, 70), (1, 150, 5), (3, 1, 1)]


def make_gradient(shape):
    """Singular values over four decades, as a gradient has them; matrices of very different norm."""
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(shape, generator=generator) * torch.logspace(-4, 0, shape[2])
    return (g * torch.logspace(-6, 3, shape[0])[:, None, None]).to(DEVICE)


def check(module, shape, dtype):
    g = make_gradient(shape)
    got = module.polar_express(g, dtype)
    assert got.dtype == dtype

    def reference(dtype):
        return op.polar_express_ref(g.to(torch.promote_types(dtype, g.dtype)), dtype)

    assert_as_good(str(shape), got, baselines(reference, dtype), reference(torch.float64))


@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_reference(shape):
    check(op, shape, torch.float32)


@pytest.mark.parametrize("shape", [(2, 70, 90), (2, 90, 70)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_iterates(shape, dtype):
    check(op, shape, dtype)


def test_zero_matrices_stay_zero():
    g = make_gradient((2, 20, 30))
    g[1] = 0
    out = op.polar_express(g, torch.float32)
    assert (out[1] == 0).all()
    assert out[0].norm() > 1


def test_tiles_off_the_diagonal_are_exactly_mirrored():
    """Within a tile on the diagonal, symmetry is up to whoever multiplies: some BLAS sum (i, j) and (j, i) apart."""
    x = make_gradient((2, 150, 40))
    out = torch.empty(2, 150, 150, device=DEVICE)
    tile, _ = op._config(150, 150)
    op._symmetric_kernel[(3, 3, 2)](x, None, out, 150 * 40, 40, 1, 150, 40, 1.0, 0.0, HAS_A=False, **tile)
    block = torch.arange(150, device=DEVICE) // tile["BLOCK"]
    apart = block[:, None] != block[None, :]
    assert apart.any()
    assert torch.equal(out[:, apart], out.mT[:, apart])
    norms = x.double().norm(dim=-1)
    error = (out - x.double() @ x.double().mT).abs() / (norms[:, :, None] * norms[:, None, :])
    assert error.max() < 1e-6


MUTANTS = {
    "the mirrored tile is not transposed": ("tl.trans(value)", "value"),
    "nothing is mirrored": ("if tile_n < tile_m:", "if tile_n < tile_m - 99:"),
    "no bA": ("M, M, c, b, HAS_A=True", "M, M, c, 0.0, HAS_A=True"),
    "no aX": ("acc += alpha * tl.load(x_ptr + offs, mask=mask", "acc += 0.0 * tl.load(x_ptr + offs, mask=mask"),
    "tall matrices as they are": ("strides = (size, cols, 1) if rows <= cols", "strides = (size, N, 1) if True"),
    "the norm of the first matrix": ("partial_ptr + tl.program_id(1) * parts + index", "partial_ptr + index"),
    "a K tail is lost": ("for k in range(0, K, BLOCK_K):", "for k in range(0, K - BLOCK_K, BLOCK_K):"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail(name, tmp_path):
    wrong = mutant(op, MUTANTS[name], folder=tmp_path)
    with pytest.raises(AssertionError):
        check(wrong, (2, 131, 70), torch.float32)


def test_errors_name_the_argument():
    g = make_gradient((2, 8, 6))
    with pytest.raises(ValueError, match="contiguous"):
        op.polar_express(g.mT)
    with pytest.raises(ValueError, match="batch"):
        op.polar_express(g[0])
    with pytest.raises(ValueError, match="dtype"):
        op.polar_express(g, torch.float64)


def test_cost_is_that_of_the_docstring():
    m, n, size = 20, 30, 600
    flops = 4 * size + 5 * (m * m * n + m**3 + 2 * m * m * n)
    moved = 2 * 4 * size + 2 * size + 5 * 2 * (4 * size + 5 * m * m)
    assert op.cost(2, 30, 20) == op.cost(2, 20, 30) == (2 * moved, 2 * flops)


REAL = [(24, 512, 512), (8, 2048, 512), (8, 512, 2048), (4, 4, 32), (2, 1000, 777), (1, 768, 768), (24, 1, 1)]


@real_and_small("shape", REAL, [(2, 70, 45), (3, 1, 1)])
def test_bfloat16_and_the_same_bits_twice(shape):
    check(op, shape, torch.bfloat16)
    g = make_gradient(shape)
    assert torch.equal(op.polar_express(g), op.polar_express(g))
