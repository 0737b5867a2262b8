"""The gradient of a weight by kernels of its own, against the product in fp64."""

import importlib

import pytest
import torch

from kernels.choice import chosen, key_of, trying
from tests.helpers.kernel_checks import DEVICE, assert_as_good, baselines, mutant, real_and_small
from tests.helpers.weight_grads import check_accumulation

pytestmark = pytest.mark.usefixtures("kernels_everywhere")
op = importlib.import_module("kernels.weight_grad")
linear, projection, head = (
    importlib.import_module(f"kernels.{name}") for name in ("linear", "qkv_projection", "linear_cross_entropy")
)
bf16 = torch.bfloat16


def slices(number, tma=False, block_m=16, block_n=32, block_k=16):
    return {"way": "slices", "SLICES": number, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "tma": tma,
            "num_warps": 4, "num_stages": 2}  # fmt: skip


def outer(number, block_m=8):
    return {"way": "outer", "SLICES": number, "BLOCK_M": block_m, "num_warps": 4}


TILES = {
    "one slice": slices(1), "three slices": slices(3), "more slices than blocks": slices(9),
    "one slice, TMA": slices(1, tma=True), "three slices, TMA": slices(3, tma=True),
    "outer products": outer(5), "outer products, one slice": outer(1), "outer products, many slices": outer(150),
}  # fmt: skip
BIG_TILES = [slices(5, block_m=64, block_n=128, block_k=256) | {"num_warps": 8, "num_stages": 3}]
BIG_TILES += [BIG_TILES[0] | {"tma": True}, BIG_TILES[0] | {"SLICES": 1}]


def make_factors(M, N, K, dtype):
    """dy and x, the latter some columns of a wider tensor."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    dy = torch.randn(M, N, generator=generator, device=DEVICE) + 0.25  # so that a row too few or too many shows
    x = torch.randn(M, K + 24, generator=generator, device=DEVICE)
    return dy.to(dtype), x.to(dtype)[:, :K]


def gradient(module, dy, x, tile, main_grad=None):
    shape = dy.shape[1], x.shape[1], x.dtype
    with trying("weight-gradient", key_of(shape), tile):
        assert module.WEIGHT_GRAD(*shape) == tile
        return module.weight_grad(dy, x, main_grad)


def check(module, dy, x, tile):
    """Added to 0.5 in fp32, and by itself in the dtype of x."""

    def product(dtype):
        return dy.to(dtype).mT @ x.to(dtype)

    main_grad = torch.full((dy.shape[1], x.shape[1]), 0.5, device=DEVICE)
    assert gradient(module, dy, x, tile, main_grad) is None
    allowed = baselines(lambda dtype: 0.5 + product(dtype))
    if DEVICE == "cuda":  # whose tensor cores do not round as fp32 does
        allowed.append(torch.full_like(main_grad, 0.5))
        module._by_vendor(dy, x, allowed[-1])
    assert_as_good("main_grad", main_grad, allowed, 0.5 + product(torch.float64))
    dw = gradient(module, dy, x, tile)
    assert dw.dtype == x.dtype
    assert_as_good("dW", dw, baselines(product, x.dtype), product(torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, bf16])
@pytest.mark.parametrize("name", TILES)
def test_against_the_product(name, dtype):
    for M, N, K in [(100, 37, 53), (96, 32, 48), (1, 1, 1), (33, 4, 32)]:
        check(op, *make_factors(M, N, K, dtype), TILES[name])


@real_and_small(
    "M, N, K, tile",
    [(262_144, N, K, tile) for N, K in ((1536, 512), (512, 512), (2048, 512)) for tile in BIG_TILES]
    + [(32_768, 8192, 512, tile) for tile in BIG_TILES]
    + [(12_345, 784, 528, tile) for tile in BIG_TILES]
    + [(262_144, 4, 32, outer(1056, 32)), (65_537, 16, 37, outer(528, 4))],
    [(50, 40, 24, slices(2)), (50, 4, 32, outer(3))],
)  # fmt: skip
def test_bfloat16_and_the_same_bits_twice(M, N, K, tile):
    dy, x = make_factors(M, N, K, bf16)
    check(op, dy, x, tile)
    runs = [torch.full((N, K), 0.5, device=DEVICE) for _ in range(2)]
    for main_grad in runs:
        gradient(op, dy, x, tile, main_grad)
    assert torch.equal(*runs)


@pytest.mark.parametrize(("N", "K"), [(32, 48), (37, 53)])
def test_a_descriptor_changes_no_bit(N, K):
    """Nor does what it does not take: a row of 37 numbers is at no multiple of 16 bytes."""
    dy, x = make_factors(100, N, K, torch.float16)
    assert op._fits_tma(dy, x) == (N == 32)
    assert not op._fits_tma(dy[:1].expand(100, N)), "rows that are one"
    assert not op._fits_tma(dy.new_zeros(100, 8, 8)[:, :1, 0]), "one number a row, with a stride all the same"
    runs = [gradient(op, dy, x, slices(3, tma)) for tma in (False, True)]
    assert torch.equal(*runs)


@pytest.mark.parametrize("tile", [slices(2, tma=True), outer(2)], ids=["slices", "outer products"])
def test_strides(tile):
    """What autograd may hand over: a gradient of a sum, one that is transposed, and rows that are one."""
    dy, x = make_factors(40, 16, 32, torch.float32)
    for other in (dy[:1, :1].expand(40, 16), dy[:1].expand(40, 16), dy.mT.contiguous().mT, dy[:, ::2], dy[:, :1]):
        check(op, other, x, tile)
        check(op, x[:, :16], other, tile)


@pytest.mark.parametrize("name", ["three slices", "three slices, TMA", "outer products"])
def test_heavy_tails(name):
    dy, x = make_factors(100, 37, 53, torch.float32)
    check(op, dy.pow(5).half(), x.half(), TILES[name])


def test_no_rows_add_nothing(monkeypatch):
    monkeypatch.setattr(op, "_by_kernels", None)  # CUDA makes no descriptor of no rows
    dy, x = make_factors(0, 16, 32, torch.float32)
    main_grad = torch.ones(16, 32, device=DEVICE)
    assert gradient(op, dy, x, slices(3), main_grad) is None
    assert (main_grad == 1).all()
    assert not gradient(op, dy, x, slices(3)).any()


def test_a_main_grad_that_is_spread_out_is_the_vendors():
    dy, x = make_factors(40, 16, 32, torch.float32)
    main_grads = [torch.ones(16, 32, device=DEVICE), torch.ones(16, 64, device=DEVICE)[:, ::2]]
    for main_grad in main_grads:
        gradient(op, dy, x, slices(3), main_grad)
    torch.testing.assert_close(*main_grads)


MUTANTS = {
    "slices end a block early": ("tl.minimum((s + 1) * rows, M)", "tl.minimum((s + 1) * rows, M - BLOCK_M)"),
    "rows past the last": ("tl.minimum((s + 1) * rows, M)", "(s + 1) * rows"),
    "a tail of blocks is lost": ("tl.cdiv(tl.cdiv(M, BLOCK_M), slices)", "(M // BLOCK_M // slices)"),
    "a slice more than its own": ("return s * rows, tl.minimum((s + 1)", "return s * rows, tl.minimum((s + 2)"),
    "one slice writes where it should add": ("value += tl.load(ptrs", "value += 0 * tl.load(ptrs"),
    "several write where they should add": ("total += tl.load(out_ptr", "total += 0 * tl.load(out_ptr"),
    "dy stands still": ("dy_ptrs += BLOCK_M * dy_stride_m", "dy_ptrs += 0"),
    "x stands still": ("x_ptrs += BLOCK_M * x_stride_m", "x_ptrs += 0"),
    "a tail of rows is not masked": ("if not EVEN_M:", "if False:"),
    "a slice begins with x's first row": (
        "x_source + offs_row[:, None] * x_stride_m", "x_source + offs_m[:, None] * x_stride_m"
    ),
    "slices are written to one place": ("(s.to(tl.int64) * N + first_n)", "first_n"),
    "the halves of a tile exchanged": ("left, right = tl.split", "right, left = tl.split"),
    "both halves in one place": ("_put(out_ptr + BLOCK_K // 2, right", "_put(out_ptr, right"),
    "the right half past the last column": ("K - first_k - BLOCK_K // 2, K", "K - first_k, K"),
    "another tile's columns": ("x_source.load([row, first_k])", "x_source.load([row, first_k % BLOCK_K])"),
    "another slice's rows": ("dy_source.load([row, first_n])", "dy_source.load([row - first, first_n])"),
    "outer products of half the rows": ("mask_m = offs_m < end - row", "mask_m = offs_m < (end - row) // 2"),
    "outer products of the first slice": ("offs_row = (row + offs_m)", "offs_row = (row - first + offs_m)"),
    "outer products, dy of the rows before": ("offs_row[None, :] * dy_stride_m, m", "offs_m[None, :] * dy_stride_m, m"),
    "the last slices are not summed": ("range(0, slices, BLOCK_S)", "range(0, slices - BLOCK_S, BLOCK_S)"),
    "slices past the last": ("(start + offs_s < slices)[:, None] &", "(offs_s >= 0)[:, None] &"),
    "one block of the sum": ("tl.program_id(0).to(tl.int64) * BLOCK + ", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail(name, tmp_path):
    wrong = mutant(op, MUTANTS[name], folder=tmp_path)

    def check_all():
        for tile in ("one slice", "three slices", "more slices than blocks", "three slices, TMA", "outer products"):
            check(wrong, *make_factors(100, 40, 56, torch.float16), TILES[tile])

    with pytest.raises(AssertionError):
        check_all()


@pytest.mark.parametrize("tile", [slices(3), outer(3)], ids=["slices", "outer products"])
def test_the_ops_take_the_way_that_was_chosen(tile, monkeypatch):
    monkeypatch.setattr(op, "_by_vendor", None)
    generator = torch.Generator(DEVICE).manual_seed(3)

    def randn(*shape):
        return torch.randn(shape, generator=generator, device=DEVICE)

    def together(function):
        return lambda *inputs: torch.cat(function(*inputs), -1)

    x, weight, gate_weight = randn(3, 17, 37), randn(53, 37), randn(4, 8)
    sizes = [(53, 37), (4, 8)]
    with chosen({"weight-gradient": {key_of((*size, torch.float32)): tile for size in sizes}}):
        check_accumulation(linear.linear, linear.linear_ref, [x, weight], [1], torch.float32)
        ways = together(projection.qkv_projection), together(projection.qkv_projection_ref)
        check_accumulation(*ways, [x, weight, gate_weight], [1, 2], torch.float32)
        given, targets = [x.view(51, 37), weight], torch.arange(51, device=DEVICE)
        monkeypatch.setattr(head, "_chunk_rows", lambda vocab_size, x: 20)  # whose sums are added up: a dW of its own
        ways = (lambda x, w, f=f: f(x, w, targets) for f in (head.linear_cross_entropy, head.linear_cross_entropy_ref))
        check_accumulation(*ways, given, [1], torch.float32)


def test_the_vendor_is_the_default_and_the_others_are_complete(monkeypatch):
    shapes = [(1536, 512), (512, 512), (2048, 512), (512, 2048), (8192, 512), (32768, 512), (2304, 768), (4, 32)]
    shapes += [(1920, 640), (640, 640), (8192, 640), (5, 32)]
    for arch, processors in op.PROCESSORS.items():
        monkeypatch.setattr(op, "gpu_arch", lambda arch=arch: arch)
        for N, K in shapes:
            vendor, *own = op.WEIGHT_GRAD.candidates(N, K, bf16)
            assert vendor == op.WEIGHT_GRAD(N, K, bf16) == {"way": "vendor"}
            assert 4 <= len(own) <= 12
            for tile in own:
                keys = {"way", "SLICES", "BLOCK_M", "num_warps"}
                if K == 32:
                    assert tile.keys() == keys
                    assert tile["way"] == "outer"
                    continue
                assert tile.keys() == keys | {"BLOCK_N", "BLOCK_K", "tma", "num_stages"}
                assert not tile["tma"] or arch >= 90
                tiles = -(-N // tile["BLOCK_N"]) * -(-K // tile["BLOCK_K"])
                # About a wave at least and four at most, but where there are more tiles than that.
                assert 0.75 * processors <= tile["SLICES"] * tiles <= max(4 * processors, tiles)
        assert op.WEIGHT_GRAD.candidates(37, 512, bf16) == [{"way": "vendor"}], "rows that are no vectors"
        assert op.WEIGHT_GRAD.candidates(512, 512, torch.float32) == [{"way": "vendor"}]
    monkeypatch.setattr(op, "gpu_arch", lambda: 90)  # 160 tiles of 256 x 128 on 132 multiprocessors: 3.6 waves, not 1.2
    assert any(tile.get("SLICES") == 3 for tile in op.WEIGHT_GRAD.candidates(8192, 640, bf16))
