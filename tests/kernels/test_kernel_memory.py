"""The rules of `kernel_memory` catch a kernel that breaks them, and none that keeps them."""

import pytest
import torch

from kernels.common import tl, triton
from tests.helpers.kernel_memory import watch_memory


@triton.jit
def _copy_kernel(x_ptr, y_ptr, N, SHIFT: tl.constexpr, BACK: tl.constexpr, OTHER: tl.constexpr, BLOCK: tl.constexpr):
    """Each program: one block of y = x, read `SHIFT` further on; with `BACK` through y itself, read again."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = offs < N
    if OTHER:
        x = tl.load(x_ptr + offs + SHIFT, mask=live, other=0.0)
    else:
        x = tl.load(x_ptr + offs + SHIFT, mask=live)
    tl.store(y_ptr + offs, x, mask=live)
    if BACK:
        tl.store(x_ptr + offs, tl.load(y_ptr + offs, mask=live, other=0.0) + 1, mask=live)


@triton.jit
def _sum_kernel(x_ptr, y_ptr, N, PLACES: tl.constexpr, OTHER: tl.constexpr, BLOCK: tl.constexpr):
    """Each program: the sum of one block, to one of the `PLACES` of y."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if OTHER:
        x = tl.load(x_ptr + offs, mask=offs < N, other=0.0)
    else:
        x = tl.load(x_ptr + offs, mask=offs < N)
    tl.store(y_ptr + tl.program_id(0) % PLACES, tl.sum(x.to(tl.float32)))


@pytest.fixture(autouse=True)
def _watched(monkeypatch):
    watch_memory(monkeypatch)


def copy(x, y, n=12, shift=0, back=False, other=True):
    _copy_kernel[(3,)](x, y, n, SHIFT=shift, BACK=back, OTHER=other, BLOCK=4)


def test_sound_kernels_pass():
    x, y, sums = torch.randn(12), torch.zeros(12), torch.zeros(3)
    copy(x, y, n=10)
    assert torch.equal(y[:10], x[:10])
    copy(x, x)  # in place, each program its own
    _sum_kernel[(3,)](x, sums, 10, PLACES=3, OTHER=True, BLOCK=4)
    assert torch.allclose(sums.sum(), x[:10].sum())


def test_an_address_that_is_in_no_tensor():
    with pytest.raises(AssertionError, match="_copy_kernel: 2 addresses that are in no tensor"):
        copy(torch.randn(12), torch.zeros(12), n=12, shift=2)


def test_a_program_reads_what_another_one_writes():
    x = torch.randn(12)
    with pytest.raises(AssertionError, match="a program reads what another one writes"):
        copy(x, x, n=10, shift=2)


def test_two_programs_write_to_one_address():
    with pytest.raises(AssertionError, match="two programs write to one address"):
        _sum_kernel[(3,)](torch.randn(12), torch.zeros(2), 12, PLACES=2, OTHER=True, BLOCK=4)


def test_a_program_reads_back_what_it_wrote():
    with pytest.raises(AssertionError, match="a program reads back what it wrote"):
        copy(torch.randn(12), torch.zeros(12), back=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lane_that_is_masked_off_holds_nothing(dtype):
    sums = torch.zeros(3, dtype=dtype)
    _sum_kernel[(3,)](torch.randn(12).to(dtype), sums, 10, PLACES=3, OTHER=False, BLOCK=4)
    assert sums.isnan().tolist() == [False, False, True]
