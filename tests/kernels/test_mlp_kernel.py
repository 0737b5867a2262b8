"""The feed-forward block's kernels against the reference in fp64."""

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
from tests.helpers.weight_grads import check_accumulation

pytestmark = pytest.mark.usefixtures("kernels_everywhere")
op = importlib.import_module("kernels.mlp")
gemm = importlib.import_module("kernels.gemm")
DTYPES = [torch.float32, torch.float16]


@pytest.fixture
def small_tiles(monkeypatch):
    """Small shapes then have many tiles: two groups of rows, and tails in every direction."""
    monkeypatch.setattr(op, "gemm_config", lambda N, K, dtype: SMALL_GEMM)


def make_inputs(rows, D, hidden, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(*rows, D), (hidden, D), (D, hidden), (*rows, D)]
    scales = [1.0, D**-0.5, hidden**-0.5, 2.0]
    return [
        (scale * torch.randn(shape, generator=generator)).to(DEVICE, dtype)
        for shape, scale in zip(shapes, scales, strict=True)
    ]


def check(function, inputs, dtype):
    results = compared(function, op.relu2_mlp_ref, [inputs], dtype)
    for name, values in zip(("out", "dx", "dw_fc", "dw_proj", "dresidual"), results, strict=True):
        assert_as_good(name, *values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_and_gradients(dtype):
    check(op.relu2_mlp, make_inputs((2, 35), 37, 91, dtype), dtype)
    check(op.relu2_mlp, make_inputs((1, 1), 16, 64, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tiles(small_tiles, dtype):
    check(op.relu2_mlp, make_inputs((2, 75), 37, 91, dtype), dtype)
    check(op.relu2_mlp, make_inputs((3, 16), 48, 96, dtype), dtype)  # nothing left over
    check(op.relu2_mlp, make_inputs((2, 20), 80, 320, dtype), dtype)  # five heads of 16


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_residual_may_become_the_result(dtype):
    def in_place(x, w_fc, w_proj, residual):
        stream = (1 * residual).view(residual.shape)  # a view, as the norm returns it
        y = op.relu2_mlp(x, w_fc, w_proj, stream, overwrite=True)
        assert y.data_ptr() == stream.data_ptr()
        return y

    inputs = make_inputs((2, 35), 37, 91, dtype)
    check(in_place, inputs, dtype)
    *rest, residual = inputs
    spread = torch.zeros(2, 35, 74, dtype=dtype, device=DEVICE)[..., ::2].copy_(residual)
    assert torch.equal(op.relu2_mlp(*rest, spread, overwrite=True), op.relu2_mlp(*inputs))
    assert torch.equal(spread, residual), "not contiguous, so it is left alone"
    kept = residual.clone()
    op.relu2_mlp(*inputs)
    assert torch.equal(residual, kept)


def test_an_overwritten_residual_is_refused_by_whoever_kept_it():
    *rest, residual = make_inputs((4,), 8, 32, torch.float32)
    stream = residual.requires_grad_().exp()  # keeps its result
    y = op.relu2_mlp(*rest, stream, overwrite=True)
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()


def test_bfloat16_in_many_tiles(small_tiles):
    check(op.relu2_mlp, make_inputs((2, 35), 37, 91, torch.bfloat16), torch.bfloat16)


def test_strided_inputs(small_tiles):
    x, w_fc, w_proj, residual = make_inputs((2, 21), 80, 64, torch.float32)
    inputs = [x[..., 3:43], w_proj[:40].T, w_fc[:, :40].T, residual[..., 40:]]
    check(op.relu2_mlp, inputs, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_add_up_in_main_grad(dtype):
    check_accumulation(op.relu2_mlp, op.relu2_mlp_ref, make_inputs((2, 21), 24, 72, dtype), [1, 2], dtype)


MUTANTS = {
    "no relu": (("z = tl.maximum(z, 0.0)", "z = z"),),
    "no residual": (("w_proj.mT, stream.detach() if overwrite else stream, overwrite)", "w_proj.mT)"),),
    "half of the gradient": (("2.0 * root * dpost", "root * dpost"),),
    "the gradient of relu, not of its square": (("2.0 * root * dpost", "tl.where(post > 0, 1.0, 0.0) * dpost"),),
    "the last column is not written": (("post, mask=mask)", "post, mask=mask & (offs_n < N - 1)[None, :])"),),
    "dW of the post-activation": (("weight_grad(dz, x,", "weight_grad(_fc_fwd(x, w_fc), x,"),),
    "dW of what took its place": (("_grad(rows, post,", "_grad(rows, _proj_bwd_(rows, w_proj, post.clone())[0],"),),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail(name, tmp_path):
    wrong = mutant(op, *MUTANTS[name], folder=tmp_path)
    with pytest.raises(AssertionError):
        check(wrong.relu2_mlp, make_inputs((2, 35), 37, 91, torch.float32), torch.float32)


TILE_MUTANTS = {
    "the last of K is left out": ("offs_k < K - start", "offs_k < K - start - 1"),
    "only the first block of K": ("a_ptrs += BLOCK_K * a_stride_k", "a_ptrs += 0"),
    "a group too many rows": ("tl.minimum(tiles_m - first_m, GROUP_M)", "GROUP_M"),
}


@pytest.mark.parametrize("name", TILE_MUTANTS)
def test_mutants_of_the_tile_fail(name, tmp_path):
    wrong, wrong_gemm = mutant(op, folder=tmp_path), mutant(gemm, TILE_MUTANTS[name], folder=tmp_path)
    wrong.gemm_config = lambda N, K, dtype: SMALL_GEMM
    inputs = make_inputs((2, 75), 37, 91, torch.float32)
    check(wrong.relu2_mlp, inputs, torch.float32)  # the copy is right as long as its tile is
    wrong.gemm_tile, wrong.tile_offsets = wrong_gemm.gemm_tile, wrong_gemm.tile_offsets
    with pytest.raises(AssertionError):
        check(wrong.relu2_mlp, inputs, torch.float32)


def test_a_gradient_that_overwrites_fails(tmp_path):
    wrong = mutant(op, ("weight_grad(rows, post, main_grad_proj)", "weight_grad(rows, post, main_grad_proj.zero_())"),
                   folder=tmp_path)  # fmt: skip
    inputs = make_inputs((2, 21), 24, 72, torch.float32)
    with pytest.raises(AssertionError):
        check_accumulation(wrong.relu2_mlp, op.relu2_mlp_ref, inputs, [1, 2], torch.float32)


def test_errors_name_the_argument():
    x, w_fc, w_proj, residual = make_inputs((4,), 8, 32, torch.float32)
    with pytest.raises(ValueError, match="w_fc"):
        op.relu2_mlp(x, w_fc[:, :5], w_proj, residual)
    with pytest.raises(ValueError, match="w_proj"):
        op.relu2_mlp(x, w_fc, w_proj.half(), residual)
    with pytest.raises(ValueError, match="residual"):
        op.relu2_mlp(x, w_fc, w_proj, residual[:2])
    with pytest.raises(ValueError, match="stride"):
        op.norm_relu2_mlp(x.T.contiguous().T, w_fc, w_proj)
    with pytest.raises(ValueError, match="float64"):
        op.relu2_mlp(*(t.double() for t in (x, w_fc, w_proj, residual)))


def test_cost_counts_every_tensor_once_a_product():
    assert op.cost(10, 16, 64) == (2 * (10 * (3 * 16 + 2 * 64) + 2 * 16 * 64), 4 * 10 * 16 * 64)
    activations = 10 * (4 * 16 + 5 * 64) * 2
    assert op.cost(10, 16, 64, backward=True) == (activations + 16 * 64 * (4 + 16), 8 * 10 * 16 * 64)


REAL = [((4, 2048), 512, 2048), ((4, 2048), 1280, 5120), ((4, 2048), 264, 1000), ((1, 1), 512, 2048)]


@real_and_small("rows, D, hidden", REAL, [((2, 35), 37, 91), ((1, 1), 16, 64)])
def test_bfloat16(rows, D, hidden):
    inputs = make_inputs(rows, D, hidden, torch.bfloat16)
    check(op.relu2_mlp, inputs, torch.bfloat16)
    check_accumulation(op.relu2_mlp, op.relu2_mlp_ref, inputs, [1, 2], torch.bfloat16)


@real_and_small("rows, D, hidden", [((2, 2048), 512, 2048)], [((2, 21), 40, 64)])
def test_strided_rows_in_bfloat16(rows, D, hidden):
    x, w_fc, w_proj, residual = make_inputs(rows, D + 8, hidden, torch.bfloat16)
    inputs = [x[..., 3 : D + 3], w_proj[:D].T, w_fc[:, :D].T, residual[..., 8:]]
    check(op.relu2_mlp, inputs, torch.bfloat16)


@real_and_small("rows, D, hidden", [((2, 2048), 512, 2048)], [((2, 21), 40, 64)])
def test_heavy_tails_in_bfloat16(rows, D, hidden):
    x, *rest = make_inputs(rows, D, hidden, torch.bfloat16)
    check(op.relu2_mlp, [x.float().pow(5).bfloat16(), *rest], torch.bfloat16)


@real_and_small("rows, D, hidden", [((8, 2048), 512, 2048)], [((2, 35), 37, 91)])
def test_the_same_bits_twice(rows, D, hidden):
    inputs = make_inputs(rows, D, hidden, torch.bfloat16)
    runs = [outputs_and_gradients(op.relu2_mlp, inputs, torch.bfloat16) for _ in range(2)]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


@real_and_small("rows, hidden", [(2**20 + 8, 2048)], [(136, 24)])
def test_past_two_to_the_31_elements(rows, hidden):
    """The last rows of a hidden layer of more than 2³¹ elements are what they are alone, bit by bit."""
    x, w_fc, w_proj, residual = make_inputs((rows,), 64, hidden, torch.bfloat16)
    last = slice(-8, None)
    post = op._fc_fwd(x, w_fc)
    dz, _ = op._proj_bwd_(residual[last], w_proj, post[last].clone())
    assert torch.equal(post[last], op._fc_fwd(x[last], w_fc))
    assert torch.equal(op._proj_bwd_(residual, w_proj, post)[0][last], dz)
