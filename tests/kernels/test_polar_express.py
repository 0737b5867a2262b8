"""Polar Express against a singular value decomposition."""

import pytest
import torch

from kernels import polar_express
from kernels.polar_express import COEFFICIENTS


def spectrum(rows: int, cols: int, values: torch.Tensor, seed: int = 0):
    """U·diag(values)·Vᵀ with random orthonormal U and V, and those two."""
    generator = torch.Generator().manual_seed(seed)
    k = min(rows, cols)
    u = torch.linalg.qr(torch.randn(rows, k, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(cols, k, generator=generator, dtype=torch.float64)).Q
    return u @ torch.diag(values.double()) @ v.T, u, v


def scalar_polynomial(x: torch.Tensor) -> torch.Tensor:
    """What the iteration does to a singular value."""
    for a, b, c in COEFFICIENTS:
        x = a * x + b * x**3 + c * x**5
    return x


k = 24
SPECTRA = {
    "random": torch.rand(k, generator=torch.Generator().manual_seed(5)) + 0.01,
    "equal": torch.ones(k),
    "ill-conditioned": torch.logspace(0, -7, k),
    "rank-deficient": torch.cat([torch.ones(k // 2), torch.zeros(k - k // 2)]),
    "one": torch.cat([torch.ones(1), torch.zeros(k - 1)]),
    "tiny": torch.full((k,), 1e-3),
    "huge": torch.logspace(4, 2, k),
}


@pytest.mark.parametrize("shape", [(k, k), (k, 60), (60, k)], ids=["square", "wide", "tall"])
@pytest.mark.parametrize("name", SPECTRA)
def test_singular_values_go_to_one(name, shape):
    values = SPECTRA[name].double()
    g, u, v = spectrum(*shape, values)
    out = polar_express(g[None], dtype=torch.float64)[0]
    normed = values / (1.02 * values.norm() + 1e-6)
    # The singular vectors stay; a value above 1e-3 lands near 1, a smaller one where the polynomial puts it.
    core = u.T @ out @ v
    mapped = core.diagonal()
    torch.testing.assert_close(core - torch.diag(mapped), torch.zeros_like(core), atol=1e-9, rtol=0)
    torch.testing.assert_close(out, u @ core @ v.T, atol=1e-9, rtol=0)
    large = normed >= 1e-3
    assert large.any()
    assert ((mapped[large] >= 0.85) & (mapped[large] <= 1.15)).all(), mapped[large]
    assert torch.linalg.svdvals(out).max() <= 1.16
    torch.testing.assert_close(mapped, scalar_polynomial(normed), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", [(32, 32), (32, 96), (96, 32)])
def test_bf16_iterates_stay_near_fp64(shape):
    torch.manual_seed(0)
    g = torch.randn(4, *shape)
    exact, rounded = polar_express(g.double(), dtype=torch.float64), polar_express(g)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.double() - exact).norm() / exact.norm() < 2e-2


def test_matrices_of_a_batch_are_independent():
    torch.manual_seed(0)
    g = torch.randn(3, 8, 20, dtype=torch.float64) * torch.tensor([1e-6, 1.0, 1e6], dtype=torch.float64)[:, None, None]
    batch = polar_express(g, dtype=torch.float64)
    for matrix, out in zip(g, batch, strict=True):
        torch.testing.assert_close(out, polar_express(matrix[None], dtype=torch.float64)[0])


def test_zero_stays_zero():
    assert not polar_express(torch.zeros(2, 4, 8)).any()
