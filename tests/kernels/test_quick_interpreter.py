"""What `quick_interpreter` leaves out changes no result, and is taken back after a launch."""

import pytest
import torch
from triton.runtime.errors import InterpreterError

from kernels.common import tl, triton


@triton.jit
def _combined(a, b, OP: tl.constexpr):
    if OP == "add":
        return a + b
    if OP == "sub":
        return a - b
    return a * b


@triton.jit
def _binary_kernel(a_ptr, b_ptr, out_ptr, OP: tl.constexpr):
    """out = a OP b of four numbers, by a device function, and their sum behind them, by one of Triton's own."""
    offs = tl.arange(0, 4)
    out = _combined(tl.load(a_ptr + offs), tl.load(b_ptr + offs), OP)
    tl.store(out_ptr + offs, out)
    tl.store(out_ptr + 4, tl.sum(out))


def binary(a, b, dtype, op):
    a, b = (torch.tensor(numbers, dtype=dtype) for numbers in (a, b))
    out = torch.zeros(5, dtype=dtype)
    _binary_kernel[(1,)](a, b, out, OP=op)
    return out


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8])
@pytest.mark.parametrize(("op", "expected"), [("add", [5, 6, 7, 8]), ("sub", [3, 2, 1, 0]), ("mul", [4, 8, 12, 16])])
def test_integers(dtype, op, expected):
    out = binary([4, 4, 4, 4], [1, 2, 3, 4], dtype, op)
    assert out.tolist() == [*expected, sum(expected)]
    assert tl.core.is_builtin(tl.load)
    assert tl.core.is_builtin(tl.tensor.__add__)


@pytest.mark.parametrize(
    ("a", "b", "op"), [(2**31 - 2, 2, "add"), (-(2**31) + 1, 2, "sub"), (2**16, 2**15, "mul"), (2**16, -(2**16), "mul")]
)
def test_an_overflow_is_an_error(a, b, op):
    with pytest.raises(InterpreterError, match=f"int32 overflow in {op}"):
        binary([0, 0, 0, a], [0, 0, 0, b], torch.int32, op)
    assert binary([0, 0, 0, a], [0, 0, 0, b], torch.int64, op)[3] == {"add": a + b, "sub": a - b, "mul": a * b}[op]


def test_the_largest_is_no_overflow():
    assert binary([0, 0, 0, 2**31 - 2], [0, 0, 0, 1], torch.int32, "add")[3] == 2**31 - 1
    assert binary([0, 0, 0, 2**16], [0, 0, 0, -(2**15)], torch.int32, "mul")[3] == -(2**31)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_floats(dtype):
    assert binary([4, 4, 4, 4], [1, 2, 3, 4], dtype, "add").tolist() == [5, 6, 7, 8, 26]
