"""Addresses past 2³¹ elements, without a GPU: of each launch the last program alone, in memory that is only reserved.

Tensors of so many elements are 4 GiB of zeros that nothing has touched: the system gives them pages where the last
program reads and writes. What it makes there is, bit for bit, what it makes of the last rows alone.
"""

import importlib

import pytest
import torch
from torch import Tensor

from kernels import rotary_attention, rotary_tables, set_ops
from kernels.rotary_attention import key_offset
from tests.helpers.kernel_checks import SMALL_GEMM, exact_bfloat16
from tests.helpers.kernel_memory import watch_memory
from tests.helpers.persistent_tiles import PERSISTENT, choose

FAR = 2**31
RESERVED = 2**28  # from so many elements on, a tensor is left as the system gives it: zeros, and no memory yet
rms_norm, mlp, product, qkv_projection, linear_cross_entropy, embedding, gemm, weight_grad = (
    importlib.import_module(f"kernels.{name}")
    for name in (
        "rms_norm", "mlp", "product", "qkv_projection", "linear_cross_entropy", "embedding", "gemm", "weight_grad",
    )
)


@pytest.fixture(autouse=True)
def last_programs(monkeypatch):
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    exact_bfloat16(monkeypatch)
    watch_memory(monkeypatch)
    # On a CPU a launch works in the tensors themselves; the interpreter copies them onto themselves all the same.
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)
    launch = GridExecutor.__call__
    set_grid, begin = InterpreterBuilder.set_grid_dim, InterpreterBuilder.set_grid_idx

    def launch_last(self, *args, **kwargs):
        far = (*self.grid, 1, 1)[:3]
        last = [n - 1 for n in far]
        with monkeypatch.context() as context:
            context.setattr(self, "grid", (1,))
            context.setattr(InterpreterBuilder, "set_grid_dim", lambda builder, *_: set_grid(builder, *far))
            context.setattr(InterpreterBuilder, "set_grid_idx", lambda builder, *_: begin(builder, *last))
            launch(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", launch_last)
    # What other programs would have written is zero, near and far.
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *size, **options: untouched(empty(*size, **options)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **options: untouched(empty_like(*args, **options)))
    set_ops("triton")
    yield
    set_ops(None)


def untouched(tensor: Tensor) -> Tensor:
    return tensor if tensor.numel() > RESERVED else tensor.zero_()


def far(rows: int, *row: int, last: int = 8) -> Tensor:
    """[rows, *row] in bf16 of more than 2³¹ elements: zeros, and random numbers in the last rows."""
    tensor = torch.empty(rows, *row, dtype=torch.bfloat16)
    assert tensor.numel() > FAR
    tensor[-last:] = randn(last, *row)
    return tensor


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def assert_same_end(value: Tensor, alone: Tensor) -> None:
    assert alone.any()
    assert torch.equal(value[-len(alone) :], alone)


@pytest.mark.parametrize("parts", ["x", "x0"])
def test_rms_norm(parts):
    x, dy = far(2**20 + 8, 2048), far(2**20 + 8, 2048)
    inputs = [x] if parts == "x" else [x, far(2**20 + 8, 2048), torch.tensor(0.9), torch.tensor(0.2)]
    results = []
    for rows in (slice(None), slice(-8, None)):
        given = [t[rows].detach().requires_grad_() if t.dim() else t for t in inputs]
        _, y, *_ = rms_norm.rms_norm(*given)
        leaves = [t for t in given if t.requires_grad]
        results.append([y.detach(), *torch.autograd.grad(y, leaves, dy[rows])])
    for value, alone in zip(*results, strict=True):
        assert_same_end(value, alone)


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_mlp(norm, persistent, monkeypatch):
    if persistent:
        choose(monkeypatch, PERSISTENT)
        monkeypatch.setattr(gemm, "_programs", lambda *_: FAR)  # a tile each
    rows, x, residual = 2**20 + 8, randn(2**20 + 8, 16), randn(2**20 + 8, 16)
    w_fc, w_proj, post = randn(2048, 16), randn(16, 2048), far(2**20 + 8, 2048)
    post[-8:].abs_()
    rstd = torch.rand(rows) if norm else None
    last = slice(-8, None)
    rstd_last = None if rstd is None else rstd[last]
    assert_same_end(mlp._fc_fwd(x, w_fc, rstd), mlp._fc_fwd(x[last], w_fc, rstd_last))
    alone, c_alone = mlp._proj_bwd_(residual[last], w_proj, post[last].clone(), rstd_last)
    dz, c = mlp._proj_bwd_(residual, w_proj, post, rstd)
    assert_same_end(dz, alone)
    if norm:
        assert_same_end(c.T, c_alone.T)
        given = (w_fc, x, residual, rstd, c)
        alone = mlp._norm_fc_bwd(alone, w_fc, *(t[last] for t in given[1:4]), c_alone)
        assert_same_end(mlp._norm_fc_bwd(dz, *given), alone)


@pytest.mark.parametrize("tile", [SMALL_GEMM, PERSISTENT], ids=["portable", "persistent"])
def test_product(tile, monkeypatch):
    choose(monkeypatch, tile)
    monkeypatch.setattr(gemm, "_programs", lambda *_: FAR)
    x, weight, residual = randn(2**20 + 8, 16), randn(2048, 16), far(2**20 + 8, 2048)
    alone = product.product(x[-8:], weight.mT, residual[-8:].clone(), overwrite=True)
    assert_same_end(product.product(x, weight.mT, residual, overwrite=True), alone)
    wide = far(2**20 + 8, 2048)
    assert_same_end(product.product(wide, weight), product.product(wide[-8:], weight))
    # Rows that are further apart than they are long, as a chunk's logits may be.
    memory = torch.empty(2**20 + 8, 2048, dtype=torch.bfloat16)
    out = product.product(x, weight[:1000].mT, out=memory[:, :1000])
    assert_same_end(out, product.product(x[-8:], weight[:1000].mT))
    assert out.data_ptr() == memory.data_ptr()
    assert not memory[-8:, 1000:].any()


def test_norms_of_rows_and_their_product():
    x = far(2**20 + 8, 2048)
    assert_same_end(mlp._rstd(x), mlp._rstd(x[-8:]))
    x, weight, rstd = randn(2**20 + 8, 16), randn(2048, 16), torch.rand(2**20 + 8)
    y = qkv_projection._norm_qkv_fwd(x, rstd, weight)
    assert y.numel() > FAR
    assert_same_end(y, qkv_projection._norm_qkv_fwd(x[-8:], rstd[-8:], weight))


@pytest.mark.parametrize(("rows", "V"), [(2**18 + 8, 8192), (2**14 + 8, 131_072)])
def test_cross_entropy(rows, V):
    logits, targets = far(rows, V), torch.arange(rows) % V
    alone, results = logits[-8:].clone(), []
    for z, t in ((logits, targets), (alone, targets[-8:])):
        losses = torch.zeros(len(t))
        linear_cross_entropy._cross_entropy(z, t, losses, linear_cross_entropy.SOFTCAP, True)
        results.append(losses)
    assert_same_end(*results)
    assert_same_end(logits, alone)


def test_embedding():
    tokens = torch.zeros(2**22 + 3, dtype=torch.int32)
    tokens[-1] = 2
    table = randn(3, 512).requires_grad_()
    (out,) = embedding.embedding(tokens, [table])
    assert out.numel() > FAR
    assert_same_end(out.detach(), table.detach()[2:])
    dout = far(2**22 + 3, 512, last=1)
    (dtable,) = torch.autograd.grad(out, table, dout)
    assert_same_end(dtable, dout[-1:])


def test_attention():
    B, T, H, head_dim = 9_800, 144, 4, 128
    cos, sin = rotary_tables(T, head_dim)
    qkv, dout = far(B, T, 3 * H * head_dim, last=1), far(3 * B, T, H * head_dim, last=1)
    results = []
    for x in (qkv[-1:].clone(), qkv):
        given = x.detach().requires_grad_()
        out = rotary_attention(given, cos, sin, H, T // 2, overwrite=True)
        results.append([out.detach(), *torch.autograd.grad(out, given, dout[-len(x) :])])
    for alone, value in zip(*results, strict=True):
        assert_same_end(value, alone)


def test_key_offset():
    B, T, head_dim = 9_800, 144, 128
    x, scale = far(B, T, 3 * 4 * head_dim, last=1), torch.rand(B, T)
    for shift in (
        lambda k, scale: key_offset.key_offset_fwd_(k, head_dim),
        lambda k, scale: key_offset.key_offset_bwd_(k, head_dim, scale),
    ):
        alone = x[-1:].clone()
        before = alone.clone()
        for rows, scales in ((alone, scale[-1:]), (x, scale)):
            shift(rows.chunk(3, dim=-1)[1], scales)
        assert not torch.equal(alone, before)
        assert_same_end(x, alone)


@pytest.mark.parametrize("tile", [
    {"way": "slices", "BLOCK_M": 128, "BLOCK_N": 16, "BLOCK_K": 16, "tma": False, "num_warps": 4, "num_stages": 2},
    {"way": "outer", "BLOCK_M": 128, "num_warps": 4},
], ids=["slices", "outer products"])  # fmt: skip
def test_weight_grad(tile):
    rows = 2**18 + 8  # the last slice has the last eight of them
    dy, x = (far(rows, 8192)[:, -width:] for width in (2, 16))
    results = []
    for part, slices in ((slice(None), 2**11 + 1), (slice(-8, None), 1)):
        results.append(torch.zeros(2, 16))
        weight_grad._by_kernels(dy[part], x[part], results[-1], True, {**tile, "SLICES": slices})
    assert_same_end(*results)
