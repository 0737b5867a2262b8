"""The products that fuse nothing but a residual, in every op that has one: by the vendor, and by our own kernels."""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from kernels.choice import asked, chosen, key_of
from tests.helpers.kernel_checks import DEVICE, SMALL_GEMM, assert_as_good, compared, mutant, real_and_small
from train.tune.targets import recorded_launches

pytestmark = pytest.mark.usefixtures("kernels_everywhere")
gemm, head, linear, mlp, product, qkv = (
    importlib.import_module(f"kernels.{name}")
    for name in ("gemm", "linear_cross_entropy", "linear", "mlp", "product", "qkv_projection")
)
PORTABLE = {"way": "triton", **SMALL_GEMM}
PERSISTENT = {**PORTABLE, "persistent": True}
FORMS = {"portable": PORTABLE, "persistent": PERSISTENT}
ROWS, ROWS_OF_A_CHUNK = 75, 32  # three chunks, the last of 11 rows


class Sizes(NamedTuple):
    """Of a model: its width, that of qkv, that of a hidden layer, and how many tokens there are."""

    rows: int
    D: int
    qkv: int
    hidden: int
    V: int


SMALL = Sizes(ROWS, 40, 72, 88, 104)  # no multiple of 64: a row of logits begins further on than the one before it ends


@pytest.fixture
def several(monkeypatch):
    """Three programs, with several tiles each, and three chunks of rows."""
    monkeypatch.setattr(gemm, "_programs", lambda *_: 3)
    monkeypatch.setattr(head, "_chunk_rows", lambda *_: ROWS_OF_A_CHUNK)


class User(NamedTuple):
    """An op, and which of its products is meant: (N, K, by_k, with_residual)."""

    op: ModuleType
    call: Callable  # of the op's module
    reference: Callable
    inputs: Callable[[Sizes], list]  # (shape, scale), or shape and the highest integer
    product: Callable[[Sizes], tuple]


def linear_over(op):
    return lambda x, w, residual: op.linear(x, w, 1 * residual, overwrite=True)


def mlp_over(op):
    return lambda x, w_fc, w_proj, residual: op.relu2_mlp(x, w_fc, w_proj, 1 * residual, overwrite=True)


def weight(rows: int, width: int, scale: float = 1.0) -> tuple:
    return (rows, width), scale * width**-0.5


def of_linear(s: Sizes) -> list:
    return [((s.rows, s.D), 1.0), weight(s.hidden, s.D), ((s.rows, s.hidden), 2.0)]


def of_mlp(s: Sizes) -> list:
    return [((s.rows, s.D), 1.0), weight(s.hidden, s.D), weight(s.D, s.hidden), ((s.rows, s.D), 2.0)]


def of_qkv(s: Sizes) -> list:
    return [((s.rows, s.D), 1.0), weight(s.qkv, s.D), weight(4, 16)]


def of_head(s: Sizes) -> list:
    return [((s.rows, s.D), 1.0), weight(s.V, s.D, 4.0), ((s.rows,), s.V)]


LINEAR = linear, lambda op: op.linear, linear.linear_ref
MLP = mlp, lambda op: op.relu2_mlp, mlp.relu2_mlp_ref
QKV = qkv, lambda op: op.qkv_projection, qkv.qkv_projection_ref
HEAD = head, lambda op: op.linear_cross_entropy, head.linear_cross_entropy_ref
NORM_MLP = mlp, lambda op: op.norm_relu2_mlp, mlp.norm_relu2_mlp_ref
USERS = {
    "linear": User(*LINEAR, lambda s: of_linear(s)[:2], lambda s: (s.hidden, s.D, False, False)),
    "linear's residual": User(*LINEAR, of_linear, lambda s: (s.hidden, s.D, False, True)),
    "linear over its residual": User(
        linear, linear_over, linear.linear_ref, of_linear, lambda s: (s.hidden, s.D, False, True)
    ),
    "linear's dx": User(*LINEAR, of_linear, lambda s: (s.D, s.hidden, True, False)),
    "qkv": User(*QKV, of_qkv, lambda s: (s.qkv, s.D, False, False)),
    "qkv's dx": User(*QKV, of_qkv, lambda s: (s.D, s.qkv, True, False)),
    "mlp": User(*MLP, of_mlp, lambda s: (s.D, s.hidden, False, True)),
    "mlp over its residual": User(mlp, mlp_over, mlp.relu2_mlp_ref, of_mlp, lambda s: (s.D, s.hidden, False, True)),
    "mlp with its norm": User(*NORM_MLP, lambda s: of_mlp(s)[:3], lambda s: (s.D, s.hidden, False, True)),
    "mlp's dx": User(*MLP, of_mlp, lambda s: (s.D, s.hidden, True, False)),
    "head": User(*HEAD, of_head, lambda s: (s.V, s.D, False, False)),
    "head's dx": User(*HEAD, of_head, lambda s: (s.D, s.V, True, False)),
}
CHUNKS = {"head": 3, "head's dx": 3}


def inputs_of(user: User, sizes: Sizes, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def one(shape, scale):
        if len(shape) == 1:
            return torch.randint(scale, shape, generator=generator).to(DEVICE)
        return (scale * torch.randn(shape, generator=generator)).to(DEVICE, dtype)

    return [one(*given) for given in user.inputs(sizes)]


def table_of(user: User, sizes: Sizes, dtype: torch.dtype, tile: dict) -> dict:
    N, K, *flags = user.product(sizes)
    return {"product": {key_of((N, K, dtype, *flags)): tile}}


def check(user: User, sizes: Sizes, dtype: torch.dtype, tile: dict, op: ModuleType | None = None, draws: int = 3):
    """With `tile` for this product and no other. Returns the launches of a forward and backward by product.py."""
    draws = [inputs_of(user, sizes, dtype, seed) for seed in range(draws)]
    with chosen(table_of(user, sizes, dtype, tile)), recorded_launches() as launches:
        results = list(compared(user.call(op or user.op), user.reference, draws, dtype))
    for index, values in enumerate(results):
        assert_as_good(f"output or gradient {index}", *values)
    names = [kernel.__name__ for kernel, *_ in launches]
    return [name for name in names if name.startswith("_product")], len(draws)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", USERS)
def test_every_user(several, name, form, dtype):
    names, draws = check(USERS[name], SMALL, dtype, FORMS[form])
    kernel = "_product_kernel" if form == "portable" else "_product_tma_kernel"
    assert names == [kernel] * (draws * CHUNKS.get(name, 1)), "this product and no other"


@pytest.mark.parametrize("name", USERS)
def test_odd_sizes(several, name):
    odd = Sizes(35, 37, 53, 91, 300)
    assert check(USERS[name], odd, torch.float16, PORTABLE)[0]
    assert not check(USERS[name], odd, torch.float16, PERSISTENT)[0], "which TMA does not take: the vendor does"


REAL = [Sizes(2048, 512, 1536, 2048, 8192), Sizes(333, 264, 520, 1000, 1032)]


@real_and_small("sizes", REAL, [SMALL])
@pytest.mark.parametrize("name", USERS)
def test_every_user_in_bfloat16(name, sizes):
    N, K, *_ = USERS[name].product(sizes)
    shape = N, K, torch.bfloat16
    for tile in (gemm.gemm_config(*shape), *gemm.persistent_candidates(*shape)[:1]):
        assert check(USERS[name], sizes, torch.bfloat16, {"way": "triton", **tile})[0]


# The file and the edit, for whom, and in which form.
RESIDUAL_ROWS = "offs_m[:, None] * residual_stride_m"
RESIDUAL_LOAD = "residual_desc.load([first_m, first_n])"
BLOCKS = "half_blocks(x, tile) for x in (residual, y)"
OUT = "residual if overwrite else out"
MUTANTS = {
    "rows of y without a gap": (product, ("offs_m[:, None] * y_stride_m", "offs_m[:, None] * N"), "head", "portable"),
    "y elsewhere": (product, (BLOCKS, BLOCKS.replace("(x,", "(x.contiguous(),")), "head", "persistent"),
    "logits not where they belong": (product, (OUT, "residual if overwrite else None"), "head", "persistent"),
    "dx of a chunk not where it belongs": (product, (OUT, "residual if overwrite else None"), "head's dx", "portable"),
    "dx of each chunk over the first": (
        head, ("out=dx[part]", "out=dx[: part.stop - part.start]"), "head's dx", "portable",
    ),
    "the residual of other rows": (
        product, (RESIDUAL_ROWS, RESIDUAL_ROWS.replace("offs_m", "(M - 1 - offs_m)")), "mlp", "portable",
    ),
    "the first rows' residual": (product, (RESIDUAL_LOAD, RESIDUAL_LOAD.replace("[", "[0 * ")), "mlp", "persistent"),
    "overwritten without the residual": (
        product, ("has_residual = residual is not None", "has_residual = not (residual is place)"),
        "mlp over its residual", "persistent",
    ),
    "dx of the other weight": (mlp, ("dx = product(dz, w_fc)", "dx = product(dz, w_proj.mT)"), "mlp's dx", "portable"),
    "dx of the transposed weight": (qkv, ("product(dqkv, weight)", "product(dqkv, weight.mT)"), "qkv's dx", "portable"),
}  # fmt: skip
SQUARE = Sizes(ROWS, 72, 72, 88, 104)  # W and its transpose have one shape


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail(several, name, tmp_path):
    file, edit, of, form = MUTANTS[name]
    user, wrong = USERS[of], mutant(USERS[of].op, *([edit] if file is not product else []), folder=tmp_path)
    wrong._chunk_rows = head._chunk_rows
    if file is product:
        check(user, SQUARE, torch.float32, FORMS[form], wrong)  # the copy is right as long as its product is
        wrong.product = mutant(product, edit, folder=tmp_path).product
    with pytest.raises(AssertionError):
        check(user, SQUARE, torch.float32, FORMS[form], wrong)


@pytest.mark.parametrize("form", FORMS)
def test_out_is_written_and_nothing_beside_it(several, form):
    """Rows that are further apart than they are long, and for the portable kernel columns too."""
    a, b = (t.half() for t in (torch.randn(75, 40), torch.randn(88, 40)))
    a, b, residual = a.to(DEVICE), b.to(DEVICE).mT, torch.randn(75, 88).to(DEVICE, torch.float16)
    with chosen({"product": {key_of((88, 40, a.dtype, False, r)): FORMS[form] for r in (False, True)}}):
        for added in (None, residual):
            expected = product.product(a, b, added)
            memory = torch.full((75, 128), 7.0, dtype=a.dtype, device=DEVICE)
            out, version = memory[:, 8:96], memory._version
            assert product.product(a, b, added, out=out) is out
            assert torch.equal(out, expected)
            assert (memory[:, [*range(8), *range(96, 128)]] == 7).all()
            assert memory._version > version
            spread = torch.full((75, 176), 7.0, dtype=a.dtype, device=DEVICE)
            product.product(a, b, added, out=spread[:, ::2])
            torch.testing.assert_close(spread[:, ::2], expected)
            assert (spread[:, 1::2] == 7).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["linear over its residual", "mlp over its residual"])
def test_an_overwritten_residual_is_refused_by_whoever_kept_it(several, name, form):
    user = USERS[name]
    *inputs, residual = inputs_of(user, SMALL, torch.float32)
    op = {"linear over its residual": linear.linear, "mlp over its residual": mlp.relu2_mlp}[name]
    stream = residual.requires_grad_().exp()  # keeps its result
    with chosen(table_of(user, SMALL, torch.float32, FORMS[form])), recorded_launches() as launches:
        y = op(*inputs, stream, overwrite=True)
    assert any(kernel.__name__.startswith("_product") for kernel, *_ in launches)
    assert y.data_ptr() == stream.data_ptr()
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()


def test_the_key_is_shape_layout_and_dtype():
    w = torch.randn(24, 16, device=DEVICE)
    with asked() as calls:
        for rows in (1, 7, 64):
            x, dy, y = (torch.randn(rows, n, device=DEVICE) for n in (16, 24, 24))
            product.product(x, w.mT)
            product.product(x, w.mT, out=torch.empty(rows, 64, device=DEVICE)[:, :24])
            product.product(x, w.mT, y)
            product.product(x, w.mT, y, overwrite=True)
            product.product(dy, w)
            product.product(dy.mT.contiguous().mT, w)
    assert {key for _, key in calls} == {
        "24 16 float32 False False", "24 16 float32 False True", "16 24 float32 True False",
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_by_default_the_bits_are_the_vendors(several, dtype):
    """Those of `torch.mm` and `torch.addmm`, in every op."""
    x, w, r = inputs_of(USERS["linear over its residual"], SMALL, dtype)
    dy = torch.randn_like(r)
    assert torch.equal(linear.linear(x, w), torch.mm(x, w.mT))
    assert torch.equal(linear.linear(x, w, r), torch.addmm(r, x, w.mT))
    assert torch.equal(linear.linear(x, w, r.clone(), overwrite=True), r.clone().addmm_(x, w.mT))
    assert torch.equal(gradient(linear.linear(x.requires_grad_(), w), x, dy), torch.mm(dy, w))

    x, w, w_gate = inputs_of(USERS["qkv"], SMALL, dtype)
    out, gate = qkv.qkv_projection(x.requires_grad_(), w, w_gate)
    d_out, d_gate = torch.randn_like(out), torch.randn_like(gate)
    dx = torch.mm(d_out, w)
    dx[:, :16].addmm_(d_gate, w_gate)
    assert torch.equal(out, torch.mm(x, w.mT))
    assert torch.equal(gradient((out, gate), x, (d_out, d_gate)), dx)

    x, w_fc, w_proj, r = inputs_of(USERS["mlp"], SMALL, dtype)
    post, dout = mlp._fc_fwd(x, w_fc), torch.randn_like(r)
    out = mlp.relu2_mlp(x.requires_grad_(), w_fc, w_proj, r)
    assert torch.equal(out, torch.addmm(r, post, w_proj.mT))
    over = mlp.relu2_mlp(x.detach(), w_fc, w_proj, r.clone(), overwrite=True)
    assert torch.equal(over, r.clone().addmm_(post, w_proj.mT))
    assert torch.equal(gradient(out, x, dout), torch.mm(mlp._proj_bwd_(dout, w_proj, post)[0], w_fc))

    x, w, targets = inputs_of(USERS["head"], SMALL, dtype)
    losses, dx = torch.empty(ROWS, device=DEVICE), torch.empty_like(x)
    buffer = torch.empty(ROWS_OF_A_CHUNK, 128, dtype=dtype, device=DEVICE)
    for start in range(0, ROWS, ROWS_OF_A_CHUNK):
        part = slice(start, min(start + ROWS_OF_A_CHUNK, ROWS))
        chunk = buffer[: part.stop - start, : SMALL.V]
        torch.mm(x[part], w.mT, out=chunk)
        head._cross_entropy(chunk, targets[part], losses[part], head.SOFTCAP, True)
        torch.mm(chunk, w, out=dx[part])
    loss = head.linear_cross_entropy(x.requires_grad_(), w, targets)
    assert torch.equal(loss, losses.sum() / ROWS)
    assert torch.equal(gradient(loss, x, torch.ones_like(loss)), dx * (torch.ones_like(loss) / ROWS))


def gradient(out, x: Tensor, cotangent) -> Tensor:
    (dx,) = torch.autograd.grad(out, x, cotangent)
    return dx
