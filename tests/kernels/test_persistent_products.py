"""Products whose programs walk over many tiles, their loads and stores by TMA, in the MLP and in `product`."""

import importlib

import pytest
import torch

from tests.helpers.kernel_checks import (
    DEVICE,
    SMALL_GEMM,
    assert_as_good,
    compared,
    mutant,
    outputs_and_gradients,
    real_and_small,
)
from tests.helpers.persistent_tiles import CHOICES, PERSISTENT, PORTABLE_KERNELS, TMA_KERNELS, choose, forbid
from train.tune.usage import ARCHS

pytestmark = pytest.mark.usefixtures("kernels_everywhere")
gemm, mlp, linear, product = (
    importlib.import_module(f"kernels.{name}") for name in ("gemm", "mlp", "linear", "product")
)
DTYPES = [torch.float32, torch.float16]


@pytest.fixture
def persistent(monkeypatch):
    """Three programs, with several tiles each. None but a persistent kernel can be launched where there are two."""
    choose(monkeypatch, PERSISTENT)
    monkeypatch.setattr(gemm, "_programs", lambda *_: 3)
    forbid(monkeypatch, PORTABLE_KERNELS)


@pytest.fixture
def fallen_back(monkeypatch):
    """Persistent tiles are chosen, and no persistent kernel can be launched."""
    choose(monkeypatch, PERSISTENT)
    forbid(monkeypatch, TMA_KERNELS)


def make(dtype, *shapes_and_scales):
    generator = torch.Generator().manual_seed(0)
    return [(scale * torch.randn(shape, generator=generator)).to(DEVICE, dtype) for shape, scale in shapes_and_scales]


def block_inputs(rows, D, F, dtype, norm=False):
    shapes = [((*rows, D), 1.0), ((F, D), D**-0.5), ((D, F), F**-0.5), ((*rows, D), 2.0)]
    return make(dtype, *(shapes[:3] if norm else shapes))


def linear_inputs(rows, K, N, dtype, residual=True):
    shapes = [((*rows, K), 1.0), ((N, K), K**-0.5), ((*rows, N), 2.0)]
    return make(dtype, *(shapes if residual else shapes[:2]))


def check(function, reference, inputs, dtype):
    for index, values in enumerate(compared(function, reference, [inputs], dtype)):
        assert_as_good(f"output or gradient {index}", *values)


def check_block(inputs, dtype, op=mlp):
    if len(inputs) == 3:
        check(op.norm_relu2_mlp, mlp.norm_relu2_mlp_ref, inputs, dtype)
    else:
        check(op.relu2_mlp, mlp.relu2_mlp_ref, inputs, dtype)


def check_linear(inputs, dtype, op=linear):
    check(op.linear, linear.linear_ref, inputs, dtype)


def overwriting(op=linear):
    return lambda x, w, r: op.linear(x, w, 1 * r, overwrite=True)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
@pytest.mark.parametrize("norm", [False, True])
def test_the_block(persistent, norm, dtype):
    # Of the last tile of F the right half is cut, then there is none of it, then it is whole.
    for rows, D, F in [((2, 75), 40, 88), ((7,), 16, 72), ((3, 16), 48, 96)]:
        check_block(block_inputs(rows, D, F, dtype, norm), dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
@pytest.mark.parametrize("residual", [False, True])
def test_linear(persistent, residual, dtype):
    for rows, K, N in [((2, 75), 40, 88), ((7,), 72, 16), ((3, 16), 48, 96)]:
        inputs = linear_inputs(rows, K, N, dtype, residual)
        check_linear(inputs, dtype)
        if residual:
            check(overwriting(), linear.linear_ref, inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_by_portable_tiles(monkeypatch, dtype):
    choose(monkeypatch, SMALL_GEMM)
    for rows, K, N in [((3, 17), 37, 53), ((1, 1), 5, 1), ((3, 16), 48, 96)]:
        for residual in (False, True):
            check_linear(linear_inputs(rows, K, N, dtype, residual), dtype)
        check(overwriting(), linear.linear_ref, inputs := linear_inputs(rows, K, N, dtype), dtype)
        x, w, r = inputs
        spread = torch.zeros(*r.shape[:-1], 2 * N, dtype=dtype, device=DEVICE)[..., ::2].copy_(r)
        assert torch.equal(linear.linear(x, w, spread), linear.linear(x, w, r))


@pytest.mark.parametrize("tile", [SMALL_GEMM, PERSISTENT], ids=["portable", "persistent"])
def test_an_overwritten_residual_is_refused_by_whoever_kept_it(tile, monkeypatch):
    choose(monkeypatch, tile)
    x, w, r = linear_inputs((4,), 40, 64, torch.float32)
    stream = r.requires_grad_().exp()  # keeps its result
    y = linear.linear(x, w, stream, overwrite=True)
    assert y.data_ptr() == stream.data_ptr()
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()


@pytest.mark.parametrize("norm", [False, True])
def test_strides_that_tma_takes(persistent, norm):
    x, w_fc, w_proj, *residual = block_inputs((2, 21), 80, 64, torch.float32, norm)
    inputs = [x[..., 8:48], w_proj[:40].T, w_fc[:, :40].T, *(r[..., 40:] for r in residual)]
    check_block(inputs, torch.float32)
    if not norm:
        check_linear([x[..., 8:48], w_proj[:40].T, x[..., :64]], torch.float32)


def test_how_many_programs_there_are_changes_no_bit(persistent, monkeypatch):
    calls = (
        (mlp.relu2_mlp, block_inputs((2, 75), 40, 88, torch.float16)),
        (mlp.norm_relu2_mlp, block_inputs((2, 75), 40, 88, torch.float16, norm=True)),
        (overwriting(), linear_inputs((2, 75), 40, 88, torch.float16)),
    )
    runs = []
    for programs in (1, 3, 1000):
        monkeypatch.setattr(gemm, "_programs", lambda *_, programs=programs: programs)
        results = [outputs_and_gradients(function, inputs, torch.float16) for function, inputs in calls]
        runs.append([result for call in results for result in call])
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


ODD = {"all": ((2, 35), 37, 91), "D": ((2, 35), 37, 96), "F": ((2, 35), 48, 91), "rows of 8 bytes": ((9,), 4, 12)}


@pytest.mark.parametrize("name", ODD)
def test_odd_sizes_fall_back(fallen_back, name):
    rows, D, F = ODD[name]
    for norm in (False, True):
        inputs = block_inputs(rows, D, F, torch.float16, norm)
        if name != "F":
            check_block(inputs, torch.float16)
        else:  # x and W_proj have rows that TMA takes, post has not
            mlp._fc_fwd(inputs[0].reshape(-1, D), inputs[1])
            mlp._proj_bwd_(inputs[0].reshape(-1, D), inputs[2], torch.ones(70, F, dtype=torch.float16, device=DEVICE))
    check_linear(linear_inputs(rows, D, F, torch.float16), torch.float16)


def test_strides_that_tma_does_not_take_fall_back(fallen_back):
    dtype = torch.float16
    x, w_fc, w_proj, _ = block_inputs((42,), 88, 64, dtype)
    narrow, w_up, w_down = x[:, :40], w_fc[:, :40], w_proj[:40]
    for moved in (
        x[:, 3:43],  # begins between two multiples of 16 bytes
        x[:, :80:2],
        narrow[:1].expand(42, 40),  # a row that stands for many
        narrow.T.contiguous().T,
    ):
        truth = moved.double() @ w_up.double().T
        assert_as_good("post", mlp._fc_fwd(moved, w_up), [truth.relu().square().to(dtype)], truth.relu().square())
        assert_as_good("y", linear.linear(moved, w_up), [truth.to(dtype)], truth)
    # The gradient of a sum is one number, expanded.
    dout, post = torch.ones(1, 1, dtype=dtype, device=DEVICE).expand(42, 40), x[:, :64].square()
    truth = 2 * x[:, :64].double().abs() * (dout.double() @ w_down.double())
    assert_as_good("dz", mlp._proj_bwd_(dout, w_down, post.clone())[0], [truth.to(dtype)], truth)
    # The factors would fit, and the residual does not.
    spread = torch.zeros(42, 67, dtype=dtype, device=DEVICE)[:, 1:65].copy_(x[:, :64])
    truth = linear.linear_ref(narrow.double(), w_up.double(), spread.double())
    assert_as_good("y", linear.linear(narrow, w_up, spread), [truth.to(dtype)], truth)


def test_no_rows_fall_back_and_are_no_error(fallen_back):
    x, w_fc, *_ = block_inputs((0,), 40, 64, torch.float16)
    assert linear.linear(x, w_fc).shape == (0, 64)


FC_TILES = '_fc_fwd_kernel` computes, persistent."""\n    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)\n'
BWD_TILES = FC_TILES.replace("_fc_fwd", "_proj_bwd")
RIGHT_HALF = "_proj_bwd_half(right, post_desc, first_m, first_n + BLOCK_N // 2"
ROWS = "tl.arange(0, BLOCK_M)\n            z *="
C_AND_RSTD = "c = tl.sum(dz * root, axis=1)\n        dz *= rstd[:, None]"
C_PLACE = "tile_n.to(tl.int64) * M + offs_m, c, mask=offs_m < M)\n\n"
# Whether the norm is inside, and the edit.
MUTANTS = {
    "post: the first tile of a program alone": (False, FC_TILES, FC_TILES + "    tiles = tl.num_programs(0)\n"),
    "dz: the first tile of a program alone": (False, BWD_TILES, BWD_TILES + "    tiles = tl.num_programs(0)\n"),
    "post: the halves exchanged": (False, "left, right = column_halves(_relu2", "right, left = column_halves(_relu2"),
    "dz: the halves exchanged": (False, "left, right = column_halves(dpost", "right, left = column_halves(dpost"),
    "post: one half over the other": (False, "first_n + BLOCK_N // 2], right", "first_n], right"),
    "dz: one half over the other": (False, RIGHT_HALF, RIGHT_HALF.replace(" + BLOCK_N // 2", "")),
    "dz: of the post below": (False, "post_desc.load([first_m,", "post_desc.load([first_m + 16,"),
    "post: rstd of the first rows": (True, "first_m + " + ROWS, ROWS),
    "dz: without rstd": (True, "dz *= rstd[:, None]", "pass"),
    "c: of the left half alone": (True, "c += _proj_bwd_half(right", "_proj_bwd_half(right"),
    "c: every tile's in one place": (True, C_PLACE, C_PLACE.replace("tile_n.to(tl.int64) * M + ", "")),
    "c: after rstd": (True, C_AND_RSTD, "dz *= rstd[:, None]\n        c = tl.sum(dz * root, axis=1)"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_of_the_block_fail(name, persistent, tmp_path):
    norm, *edit = MUTANTS[name]
    wrong = mutant(mlp, edit, folder=tmp_path)
    wrong.gemm_config = mlp.gemm_config
    with pytest.raises(AssertionError):
        check_block(block_inputs((2, 35), 40, 88, torch.float32, norm), torch.float32, wrong)


Y_LOAD, RESIDUAL = "residual_desc.load([first_m, first_n])", "tl.load(residual_ptrs, mask=mask, other=0.0)"
LAST_ROW = "y_ptr.dtype.element_ty), mask=mask"
LINEAR_MUTANTS = {
    "the halves exchanged": ("left, right = column_halves(acc", "right, left = column_halves(acc"),
    "the residual is left out": (f"acc += {Y_LOAD}", f"acc += 0 * {Y_LOAD}"),
    "the residual twice": (f"acc += {Y_LOAD}", f"acc += 2 * {Y_LOAD}"),
    "portable: the residual is left out": (f"acc += {RESIDUAL}", f"acc += 0 * {RESIDUAL}"),
    "portable: one column of the residual": ("offs_n[None, :] * residual_stride_n", "residual_stride_n"),
    "portable: the last row is not written": (LAST_ROW, f"{LAST_ROW} & (offs_m < M - 1)[:, None]"),
}


@pytest.mark.parametrize("name", LINEAR_MUTANTS)
def test_mutants_of_linear_fail(name, tmp_path, monkeypatch):
    choose(monkeypatch, SMALL_GEMM if name.startswith("portable") else PERSISTENT)
    monkeypatch.setattr(gemm, "_programs", lambda *_: 3)
    wrong = mutant(linear, folder=tmp_path)
    inputs = linear_inputs((2, 35), 40, 40, torch.float32)
    check_linear(inputs, torch.float32, wrong)  # the copy is right as long as its product is
    wrong.product = mutant(product, LINEAR_MUTANTS[name], folder=tmp_path).product
    with pytest.raises(AssertionError):
        check_linear(inputs, torch.float32, wrong)


def test_dx_by_the_transposed_weight_fails(persistent, tmp_path):
    wrong = mutant(linear, ("product(rows, weight)", "product(rows, weight.mT)"), folder=tmp_path)
    with pytest.raises(AssertionError):
        check_linear(linear_inputs((2, 35), 40, 40, torch.float32), torch.float32, wrong)


TILE_MUTANTS = {
    "only the first block of A": ("a_desc.load([first_m, start])", "a_desc.load([first_m, 0])"),
    "only the first block of B": ("b_desc.load([start, first_n])", "b_desc.load([0, first_n])"),
    "only the first block of Bᵀ": ("b_desc.load([first_n, start])", "b_desc.load([first_n, 0])"),
    "a group too many rows": ("tl.minimum(tiles_m - first_m, GROUP_M)", "GROUP_M"),
    "every second column a half": ("2, BLOCK_N // 2).permute(0, 2, 1)", "BLOCK_N // 2, 2)"),
}


@pytest.mark.parametrize("name", TILE_MUTANTS)
def test_mutants_of_the_tile_fail(name, persistent, tmp_path):
    wrong, wrong_gemm = mutant(mlp, folder=tmp_path), mutant(gemm, TILE_MUTANTS[name], folder=tmp_path)
    wrong.gemm_config = mlp.gemm_config
    inputs = block_inputs((2, 75), 40, 88, torch.float32)
    check_block(inputs, torch.float32, wrong)  # the copy is right as long as its tile is
    for part in ("gemm_tile_tma", "tile_at", "column_halves"):
        setattr(wrong, part, getattr(wrong_gemm, part))
    with pytest.raises(AssertionError):
        check_block(inputs, torch.float32, wrong)


def test_candidates(monkeypatch):
    """Persistent ones where there is TMA, where rows fit it, and never by default."""
    for arch in (0, 80, 86, 89, 90, 100, 103, 120):
        monkeypatch.setattr(gemm, "gpu_arch", lambda arch=arch: arch)
        for choice in CHOICES:
            more = (False, True) if choice is product.PRODUCT else ()  # as linear's forward asks for it
            default, *others = choice.candidates(2048, 512, torch.bfloat16, *more)
            assert not default.get("persistent")
            walking = [tile for tile in others if tile.get("persistent")]
            assert bool(walking) == (arch >= 90)
            for tile in others:
                assert {"BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages"} <= tile.keys()
            for shape in ((2044, 512, torch.bfloat16), (2048, 508, torch.bfloat16), (2048, 512, torch.float32)):
                assert not any(tile.get("persistent") for tile in choice.candidates(*shape, *more))
    assert product.PRODUCT.default(2048, 512, torch.bfloat16, False, True) == {"way": "vendor"}


@pytest.mark.parametrize("arch", [0, 80, 86, 89, 90, 100, 103, 120])
def test_portable_candidates_are_few_and_fit(arch, monkeypatch):
    """All of a step are compiled before it is tuned."""
    monkeypatch.setattr(gemm, "gpu_arch", lambda: arch)
    shared = ARCHS[arch].shared_per_cta if arch else 99 * 1024
    for K in (512, 2048):
        shape = 512, K, torch.bfloat16
        many, tight = gemm.gemm_candidates(*shape), gemm.gemm_candidates(*shape, tight=True)
        few = [t for t in product.PRODUCT.candidates(*shape, True, False)[1:] if "persistent" not in t]
        assert 8 < len(many) <= 16
        assert 3 < len(tight) < len(many)
        assert 3 <= len(few) <= 4
        assert {"way": "triton", **gemm.gemm_config(*shape)} in few
        assert {t["num_warps"] for t in many} == {t["num_warps"] for t in tight} == {4, 8}
        for tile in (*many, *few):
            assert (tile["BLOCK_M"] + tile["BLOCK_N"]) * tile["BLOCK_K"] * 2 * tile["num_stages"] <= shared
    assert gemm.gemm_candidates(500, 512, torch.bfloat16) == gemm.few_gemm_candidates(512, 512, torch.float32) == []


@pytest.mark.parametrize("arch", [80, 86, 89])
def test_where_there_is_no_tma_a_persistent_tile_falls_back(arch, fallen_back, monkeypatch):
    monkeypatch.setattr(gemm, "gpu_arch", lambda: arch)
    check_block(block_inputs((2, 35), 40, 88, torch.float32), torch.float32)


def tiles_here(N, K):
    """What may be tried on this GPU, or the interpreter's one."""
    return gemm.persistent_candidates(N, K, torch.bfloat16) if DEVICE == "cuda" else [PERSISTENT]


REAL = [((4, 2048), 512, 2048), ((4, 2048), 1280, 5120), ((3, 333), 264, 1000), ((1, 1), 512, 2048)]
SMALL = [((2, 35), 40, 88), ((1, 1), 16, 64)]


@real_and_small("rows, D, hidden", REAL, SMALL)
def test_the_block_in_bfloat16(rows, D, hidden, monkeypatch):
    for norm in (False, True):
        inputs = block_inputs(rows, D, hidden, torch.bfloat16, norm)
        for tile in tiles_here(hidden, D):
            choose(monkeypatch, tile)
            check_block(inputs, torch.bfloat16)


@real_and_small("rows, K, N", [((8, 2048), 512, 512), ((4, 2048), 1280, 3840), ((3, 333), 504, 104)], SMALL)
def test_linear_in_bfloat16(rows, K, N, monkeypatch):
    inputs = linear_inputs(rows, K, N, torch.bfloat16)
    for tile in [*tiles_here(N, K), gemm.gemm_config(N, K, torch.bfloat16)]:
        choose(monkeypatch, tile)
        check_linear(inputs, torch.bfloat16)
        check(overwriting(), linear.linear_ref, inputs, torch.bfloat16)


@real_and_small("rows, D, hidden", [((32, 2048), 512, 2048)], [((2, 35), 40, 88)])
def test_the_same_bits_twice(rows, D, hidden, monkeypatch):
    """In place a race would show here, if anywhere."""
    for norm in (False, True):
        inputs = block_inputs(rows, D, hidden, torch.bfloat16, norm)
        function = mlp.norm_relu2_mlp if norm else mlp.relu2_mlp
        for tile in tiles_here(hidden, D):
            choose(monkeypatch, tile)
            runs = [outputs_and_gradients(function, inputs, torch.bfloat16) for _ in range(3)]
            assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


@real_and_small("rows, hidden", [(2**20 + 8, 2048)], [(136, 24)])
def test_past_two_to_the_31_elements(rows, hidden, monkeypatch):
    """The last rows of a hidden layer of more than 2³¹ elements are what they are alone, bit by bit."""
    x, w_fc, w_proj, dout = block_inputs((rows,), 64, hidden, torch.bfloat16)
    last = slice(-8, None)
    for tile in tiles_here(hidden, 64)[:1]:
        choose(monkeypatch, tile)
        post = mlp._fc_fwd(x, w_fc)
        dz, _ = mlp._proj_bwd_(dout[last], w_proj, post[last].clone())
        assert torch.equal(post[last], mlp._fc_fwd(x[last], w_fc))
        assert torch.equal(mlp._proj_bwd_(dout, w_proj, post)[0][last], dz)
