"""Norms in the epilogues of the products: the kernels against references that write every norm, in fp64."""

import importlib

import pytest
import torch

import kernels
from kernels.common import upcast
from kernels.gemm import gemm_config
from kernels.rotary_attention import rotary_attention_ref, rotary_tables
from model import GPT, GPTConfig
from tests.helpers.kernel_checks import DEVICE, SMALL_GEMM, assert_as_good, compared, mutant, outputs_and_gradients
from tests.helpers.weight_grads import check_accumulation
from tests.helpers.whole_model import check_step, loss_and_gradients

mlp = importlib.import_module("kernels.mlp")
projection = importlib.import_module("kernels.qkv_projection")
rms_norm = importlib.import_module("kernels.rms_norm")
H, KVH, HEAD_DIM, WINDOW = 2, 1, 16, 9


@pytest.fixture(autouse=True)
def small_tiles(kernels_everywhere, monkeypatch):
    for op in (mlp, projection):  # many tiles, and tails in every direction
        monkeypatch.setattr(op, "gemm_config", lambda N, K, dtype: SMALL_GEMM)


def draw(*shapes_and_scales, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(shape, generator=generator)).to(DEVICE) for shape, scale in shapes_and_scales]


def stream(*shape, seed=0):
    """Rows from ones that eps outweighs to large ones."""
    (x,) = draw((shape, 1.0), seed=seed)
    return x * torch.logspace(-4, 1, shape[-2], device=DEVICE)[:, None]


def mlp_inputs(rows, D, F, dtype):
    w_fc, w_proj = draw(((F, D), D**-0.5), ((D, F), F**-0.5), seed=1)
    return [t.to(dtype) for t in (stream(*rows, D), w_fc, w_proj)]


def check_mlp(function, inputs, dtype):
    results = compared(function, mlp.norm_relu2_mlp_ref, [inputs], dtype)
    for name, values in zip(("out", "dx", "dw_fc", "dw_proj"), results, strict=True):
        assert_as_good(name, *values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_mlp_outputs_and_gradients(dtype):
    check_mlp(mlp.norm_relu2_mlp, mlp_inputs((2, 35), 37, 91, dtype), dtype)
    check_mlp(mlp.norm_relu2_mlp, mlp_inputs((3, 16), 48, 96, dtype), dtype)  # nothing left over
    check_mlp(mlp.norm_relu2_mlp, mlp_inputs((2, 10), 160, 640, dtype), dtype)  # five heads of 32


@pytest.mark.parametrize("width", ["D", "F"])
def test_mlp_widths_past_1024_that_no_block_divides(width, monkeypatch):
    """Their tile is that of a shorter product, and what is left over of theirs has its mask."""
    monkeypatch.setattr(mlp, "gemm_config", gemm_config)
    sizes = {"D": 32, "F": 64, width: 1040}
    check_mlp(mlp.norm_relu2_mlp, mlp_inputs((3,), **sizes, dtype=torch.float16), torch.float16)


def test_mlp_bfloat16():
    check_mlp(mlp.norm_relu2_mlp, mlp_inputs((2, 35), 37, 91, torch.bfloat16), torch.bfloat16)


def test_mlp_gradients_add_up_in_main_grad():
    inputs = mlp_inputs((2, 21), 24, 72, torch.float32)
    check_accumulation(mlp.norm_relu2_mlp, mlp.norm_relu2_mlp_ref, inputs, [1, 2], torch.float32)


def test_mlp_strided_rows_and_an_expanded_gradient():
    x, w_fc, w_proj = mlp_inputs((6,), 80, 64, torch.float32)
    x, w_fc, w_proj = (t.requires_grad_() for t in (x[:, 7:47], w_fc[:, :40].detach(), w_proj[:40].detach()))
    mlp.norm_relu2_mlp(x, w_fc, w_proj).sum().backward()
    truth = [t.detach().double().requires_grad_() for t in (x, w_fc, w_proj)]
    mlp.norm_relu2_mlp_ref(*truth).sum().backward()
    for got, exact in zip((w_fc, w_proj), truth[1:], strict=True):
        torch.testing.assert_close(got.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)


MLP_MUTANTS = {
    "no c": (("acc -= x.to(tl.float32) * (rstd * rstd * c / N)[:, None]", "acc -= 0 * x.to(tl.float32)"),),
    "half of c": (("(dz * root, axis=1)\n        _", "(dz * root / 2, axis=1)\n        _"),),
    "c of rstd ⊙ dz": (("(rstd * rstd * c / N)", "(rstd * rstd * rstd * c / N)"),),
    "one tile's part of c is left out": (("for _ in range(C_TILES)", "for _ in range(C_TILES - 1)"),),
    "dz without rstd": (("        dz *= tl.load(rstd_ptr + offs_m, mask=offs_m < M, other=0.0)[:, None]\n", ""),),
    "dW without rstd": (("weight_grad(dz, x, main_grad_fc)", "weight_grad(dz / rstd[:, None], x, main_grad_fc)"),),
    "no residual's gradient": (("    acc += dout.to(tl.float32)\n", ""),),
    "no eps": (("axis=1) / D + EPS), mask", "axis=1) / D), mask"),),
    "rstd reads past the row": (("(offs_m < M)[:, None] & (offs_d < D)[None, :]", "(offs_m < M - 1)[:, None]"),),
    "the last row has no c": (("c, mask=offs_m < M)\n        dz", "c, mask=offs_m < M - 1)\n        dz"),),
}


@pytest.mark.parametrize("name", MLP_MUTANTS)
def test_mlp_mutants_fail(name, tmp_path):
    wrong = mutant(mlp, *MLP_MUTANTS[name], folder=tmp_path)
    wrong.gemm_config = mlp.gemm_config
    with pytest.raises(AssertionError):
        check_mlp(wrong.norm_relu2_mlp, mlp_inputs((2, 35), 37, 91, torch.float32), torch.float32)


def attention_inputs(T=21, D=40):
    """x, x0, both λ, W_qkv, W_gate, ve."""
    width, channels = (H + 2 * KVH) * HEAD_DIM, 8
    weights = draw(((width, D), D**-0.5), ((KVH, channels), 1.0), ((2, T, KVH * HEAD_DIM), 1.0), seed=2)
    lambdas = [torch.tensor(value, device=DEVICE) for value in (1.25, -0.375)]
    return [stream(2, T, D), 0.5 * stream(2, T, D, seed=3), *lambdas, *weights]


def attention_ref(x, x0, lambda_r, lambda_0, w_qkv, w_gate, ve):
    s, y, _ = rms_norm.rms_norm_ref(x, x0, upcast(lambda_r), upcast(lambda_0))
    qkv, gate = y @ w_qkv.T, y[..., : w_gate.shape[1]] @ w_gate.T
    cos, sin = rotary_tables(x.shape[1], HEAD_DIM, device=DEVICE)
    return s, rotary_attention_ref(qkv, cos, sin, H, WINDOW, ve, gate)


def attention_of(factors, products, attention=kernels.rotary_attention):
    def function(x, x0, lambda_r, lambda_0, w_qkv, w_gate, ve):
        s, y, _ = factors(x, x0, upcast(lambda_r), upcast(lambda_0))
        qkv, gate = products(y, w_qkv, w_gate)
        cos, sin = rotary_tables(x.shape[1], HEAD_DIM, device=DEVICE)
        return s, attention(qkv, cos, sin, H, WINDOW, ve, gate, overwrite=True)

    return function


def check_attention(function, D=40):
    names = ("s", "out", "dx", "dx0", "dλr", "dλ0", "dw_qkv", "dw_gate", "dve")
    results = compared(function, attention_ref, [attention_inputs(D=D)], torch.float32)
    for name, values in zip(names, results, strict=True):
        assert_as_good(name, *values)


@pytest.mark.parametrize("D", [40, 80])  # a row in one part, and in five
def test_from_the_stream_to_attention(D):
    """A norm in two factors, its products and the gradients that attention scales are one whole: the written norm's."""
    check_attention(attention_of(kernels.norm_factors, kernels.qkv_projection), D)


def test_references_do_not_need_scaled_gradients():
    kernels.set_ops("reference")
    for a, b in zip(
        *(outputs_and_gradients(f, attention_inputs(), torch.float64)
          for f in (attention_of(kernels.norm_factors, kernels.qkv_projection), attention_ref)), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b)


CHAIN_MUTANTS = {
    "no rstd in the product": (projection, ("(acc * rstd[:, None])", "acc")),
    "no rstd in the gate": (projection, ("gate.mul_(rstd.view(-1, 1))", "pass")),
    "gradients not scaled": (projection, ("return GradScaled(qkv,", "rstd = rstd * 0 + 1; return GradScaled(qkv,")),
    "the gate's dx is lost": (projection, ("dx[:, :channels].addmm_(dgate, gate_weight)", "pass")),
    "a row past the end": (projection, ("offs_m, mask=offs_m < M,", "offs_m, mask=offs_m < M - 1,")),
    "no projection": (rms_norm, ("- normed[part] * along", "")),
    "scaled where it is already": (rms_norm, ("scaled if SCALED else rstd * scaled", "rstd * scaled")),
    "no eps": (rms_norm, ("axis=1) / D + EPS)", "axis=1) / D)")),
}


@pytest.mark.parametrize("name", CHAIN_MUTANTS)
def test_chain_mutants_fail(name, tmp_path):
    module, edit = CHAIN_MUTANTS[name]
    wrong = mutant(module, edit, folder=tmp_path)
    if module is projection:
        wrong.gemm_config = projection.gemm_config
        function = attention_of(kernels.norm_factors, wrong.qkv_projection)
    else:
        function = attention_of(wrong.norm_factors, kernels.qkv_projection)
    with pytest.raises(AssertionError):
        check_attention(function)


@pytest.mark.parametrize("has_ve", [True, False])
def test_attention_scales_the_gradients_of_qkv_and_gate_alone(has_ve):
    qkv, ve, gate, scale = draw(((2, 21, 64), 1.0), ((2, 21, 16), 1.0), ((2, 21, 1), 1.0), ((2, 21), 1.0))
    cos, sin = rotary_tables(21, HEAD_DIM, device=DEVICE)
    inputs = [qkv, ve, gate] if has_ve else [qkv]

    def wanted(tensor, scale):
        return tensor if None in (tensor, scale) else kernels.GradScaled(tensor, scale)

    def gradients(scale):
        return outputs_and_gradients(
            lambda qkv, ve=None, gate=None: kernels.rotary_attention(
                wanted(qkv, scale), cos, sin, H, WINDOW, ve, wanted(gate, scale)
            ), inputs, torch.float32,
        )  # fmt: skip

    plain, scaled = gradients(None), gradients(scale)
    factors = [1.0, scale[..., None], 1.0, scale[..., None]]  # out, dqkv, dve, dgate
    for value, scaled_value, factor in zip(plain, scaled, factors, strict=False):
        torch.testing.assert_close(scaled_value, value * factor)


def test_the_whole_model(monkeypatch):
    """Loss, every gradient and one update against the references, and bit by bit with recompute. The step has more
    tokens than the model is wide: of a gradient without full rank Muon would make noise."""
    monkeypatch.undo()  # small tiles are many programs
    shape = GPTConfig(vocab_size=90, seq_len=11, depth=3, d_model=32, head_dim=16, num_kv_heads=1, window_pattern="S")
    check_step(monkeypatch, shape, rows=2, fused_norms=True)
    kept, again = (
        loss_and_gradients("triton", shape, 2, fused_norms=True, recompute=recompute) for recompute in (False, True)
    )
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_errors_name_the_argument():
    x, rstd, w, w_gate = draw(((4, 8), 1.0), ((4,), 1.0), ((6, 8), 1.0), ((2, 4), 1.0))
    for named, arguments in {
        "weight": (x, rstd, w.half(), w_gate),
        "gate_weight": (x, rstd, w, w_gate[0]),
        "fit": (x, rstd, w[:, :5], w_gate),
        "rstd": (x, rstd[:2], w, w_gate),
        "without rstd": (x, None, w, w_gate),
        "float64": (x.double(), rstd, w, w_gate),
    }.items():
        with pytest.raises(ValueError, match=named):
            kernels.qkv_projection(kernels.Factors(*arguments[:2]), *arguments[2:])
    cos, sin = rotary_tables(4, HEAD_DIM, device=DEVICE)
    qkv, ve, gate = draw(((1, 4, 64), 1.0), ((1, 4, 16), 1.0), ((1, 4, 1), 1.0))
    with pytest.raises(ValueError, match="grad_scale"):
        kernels.rotary_attention(kernels.GradScaled(qkv, rstd), cos, sin, H, WINDOW)
    scaled = kernels.GradScaled(qkv, rstd[None])
    with pytest.raises(ValueError, match="both as GradScaled"):
        kernels.rotary_attention(scaled, cos, sin, H, WINDOW, ve, gate)
    w_fc, w_proj = draw(((16, 8), 1.0), ((8, 16), 1.0))
    for wrong in (kernels.Factors(x, rstd), kernels.Factors(x.clone(), None)):
        with pytest.raises(ValueError, match="norm_factors"):
            kernels.relu2_mlp(wrong, w_fc, w_proj, x)


@pytest.mark.parametrize("ops", ["reference", "triton"])
def test_what_does_not_know_a_fused_norm_is_an_error(ops):
    """Neither a norm's factors nor what wants a scaled gradient passes for a tensor: not in an op, not in PyTorch."""
    kernels.set_ops(ops)
    x, x0, w, w_proj = draw(((3, 4, 8), 1.0), ((3, 4, 8), 1.0), ((24, 8), 1.0), ((8, 24), 1.0))
    lambdas = [torch.tensor(value, device=DEVICE) for value in (1.25, -0.375)]
    qkv, _ = kernels.qkv_projection(kernels.norm_factors(x, x0, *lambdas)[1], w)
    for strange in (kernels.norm_factors(x)[1], kernels.norm_factors(x, x0, *lambdas)[1], qkv):
        for reads in (
            lambda y: kernels.linear(y, w), lambda y: torch.nn.functional.linear(y, w), lambda y: y @ w.mT,
            lambda y: y[..., :4], lambda y: x + y, lambda y: y.relu(), lambda y: kernels.rms_norm(y),
            lambda y: kernels.linear(x, w_proj[:, :8], residual=y),
        ):  # fmt: skip
            with pytest.raises((TypeError, AttributeError)):
                reads(strange)


class _OtherMLP(GPT):
    """Its feed-forward block is another one."""

    def _layer(self, i, x, x0, value):
        block = kernels.relu2_mlp

        def silu_mlp(y, w_fc, w_proj, residual, **options):
            return kernels.linear(torch.nn.functional.silu(kernels.linear(y, w_fc)), w_proj, residual=residual)

        kernels.relu2_mlp = silu_mlp
        try:
            return super()._layer(i, x, x0, value)
        finally:
            kernels.relu2_mlp = block


def test_another_block_never_trains_as_the_old_one():
    """A layer has one call of its feed-forward block. One that knows no factors is an error with --fused-norms, and its
    loss without them is not that of the old block."""
    kernels.set_ops("reference")
    shape = GPTConfig(vocab_size=50, seq_len=8, depth=2, d_model=32, head_dim=16)
    tokens = torch.arange(9)[None]
    losses = []
    for kind in (GPT, _OtherMLP):
        model = kind(shape)
        model.init_weights(0)
        torch.nn.init.normal_(model.w_proj, generator=torch.Generator().manual_seed(0))
        losses.append(model(tokens[:, :-1], tokens[:, 1:]).item())
    assert losses[0] != losses[1]
    model.fused_norms = True
    with pytest.raises((TypeError, AttributeError)):
        model(tokens[:, :-1], tokens[:, 1:])


def test_costs_count_what_is_no_longer_written():
    rows, D = 10, 512
    norm = [rms_norm.cost(rows, D, backward=b)[0] for b in (False, True)]
    saved = [norm[b] + mlp.cost(rows, D, 4 * D, backward=b)[0] - mlp.cost(rows, D, 4 * D, norm=True, backward=b)[0]
             for b in (False, True)]  # fmt: skip
    assert saved == [rows * (D * 2 + 4), rows * (2 * D * 2 + 4)]  # y; its gradient, written and read
    mixed = rms_norm.cost(rows, D, has_x0=True)[0] - rms_norm.cost(rows, D, has_x0=True, has_y=False)[0]
    assert mixed == rows * D * 2


@pytest.mark.gpu
@pytest.mark.parametrize(("D", "F"), [(512, 2048), (640, 2560), (264, 1000)])
def test_mlp_bfloat16_at_the_models_shape(monkeypatch, D, F):
    monkeypatch.undo()
    kernels.set_ops("triton")
    check_mlp(mlp.norm_relu2_mlp, mlp_inputs((4, 2048), D, F, torch.bfloat16), torch.bfloat16)
