"""The head's loss by its kernel against the reference in fp64."""

import importlib

import pytest
import torch

from kernels.common import set_ops
from tests.helpers.kernel_checks import (
    DEVICE,
    assert_as_good,
    baselines,
    compared,
    mutant,
    outputs_and_gradients,
    real_and_small,
)
from tests.helpers.weight_grads import check_accumulation

pytestmark = pytest.mark.usefixtures("kernels_everywhere")
op = importlib.import_module("kernels.linear_cross_entropy")
DTYPES = [torch.float32, torch.float16]
LOOP = {"ONE_BLOCK": False, "BLOCK_V": 128, "num_warps": 4}


@pytest.fixture(params=["one block", "blocks"])
def either_config(request, monkeypatch):
    """The two ways through a row, in several chunks of rows."""
    monkeypatch.setattr(op, "_chunk_rows", lambda vocab_size, device: 16)
    if request.param == "blocks":
        monkeypatch.setattr(op, "_config", lambda V: LOOP)


def make_inputs(N, D, V, dtype, scale=4.0, seed=0, ignored=True):
    """Logits of `scale`: some of them well into the softcap. Two targets, the last one too, do not count."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=generator)
    weight = torch.randn(V, D, generator=generator) * scale * D**-0.5
    targets = torch.randint(0, V, (N,), generator=generator)
    if ignored:
        targets[[N // 2, -1]] = op.IGNORED
    return [x.to(DEVICE, dtype), weight.to(DEVICE, dtype), targets.to(DEVICE)]


def check(module, dtype, shape, draws=8, **kwargs):
    inputs = [make_inputs(*shape, dtype, seed=seed, **kwargs) for seed in range(draws)]
    results = compared(module.linear_cross_entropy, op.linear_cross_entropy_ref, inputs, dtype)
    for name, values in zip(("loss", "dx", "dweight"), results, strict=True):
        assert_as_good(name, *values)


@torch.no_grad()
def check_losses(function, inputs):
    x, weight, targets = inputs
    got = function(x, weight, targets, reduction="none")

    def reference(dtype):
        return op.linear_cross_entropy_ref(x.to(dtype), weight.to(dtype), targets, reduction="none")

    assert_as_good("losses", got, baselines(reference, x.dtype), reference(torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_and_gradients(either_config, dtype):
    check(op, dtype, (21, 19, 300))
    check(op, dtype, (16, 32, 256), draws=4)  # nothing left over


def test_bfloat16_either_way(either_config):
    check(op, torch.bfloat16, (21, 19, 300), draws=4)


@pytest.mark.parametrize("V", [256, 257, 16384, 16385, 50257, 131_071])
def test_every_vocabulary_in_its_own_tiles(V):
    check_losses(op.linear_cross_entropy, make_inputs(3, 5, V, torch.float32, ignored=False))
    check(op, torch.float32, (3, 5, V), draws=1 if V > 20_000 else 8, ignored=False)


@pytest.mark.parametrize("ops", ["triton", "reference"])
def test_a_mean_over_no_token_is_nan(ops):
    set_ops(ops)
    x, weight, targets = make_inputs(5, 8, 300, torch.float32)
    loss = op.linear_cross_entropy(x.requires_grad_(), weight, torch.full_like(targets, op.IGNORED))
    assert loss.isnan()
    with torch.no_grad():
        losses = op.linear_cross_entropy(x, weight, torch.full_like(targets, op.IGNORED), reduction="none")
    assert not losses.any()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # infinite on purpose: tanh is then 1
@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_of_every_token(either_config, dtype):
    for V in (257, 1000):
        check_losses(op.linear_cross_entropy, make_inputs(53, 24, V, dtype))
    check_losses(op.linear_cross_entropy, make_inputs(53, 24, 300, dtype, scale=300.0))  # all at the softcap


def test_the_mean_without_gradients_is_the_same(either_config):
    x, weight, targets = make_inputs(37, 19, 300, torch.float32)
    with torch.no_grad():
        mean = op.linear_cross_entropy(x, weight, targets)
        losses = op.linear_cross_entropy(x, weight, targets.int(), reduction="none")
    assert torch.equal(mean, op.linear_cross_entropy(x.requires_grad_(), weight, targets))
    assert torch.equal(mean, losses.sum() / 35)
    assert not losses[targets == op.IGNORED].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_add_up_in_main_grad(either_config, dtype):
    inputs = make_inputs(37, 19, 300, dtype)
    check_accumulation(op.linear_cross_entropy, op.linear_cross_entropy_ref, inputs, [1], dtype)


def test_the_chunked_reference_ignores_the_same_tokens(either_config):
    set_ops("reference")
    check(op, torch.float32, (37, 19, 300), draws=2)
    check_losses(op.linear_cross_entropy, make_inputs(37, 19, 300, torch.float32))


def test_one_gradient_may_be_unwanted(either_config):
    x, weight, targets = make_inputs(20, 16, 300, torch.float32)
    x.requires_grad_()
    op.linear_cross_entropy(x, weight, targets).backward()
    alone, x.grad = x.grad, None
    op.linear_cross_entropy(x, weight.requires_grad_(), targets).backward()
    assert torch.equal(alone, x.grad)
    both, weight.grad = weight.grad, None
    op.linear_cross_entropy(x.detach(), weight, targets).backward()
    assert torch.equal(both, weight.grad)


def test_a_target_outside_the_vocabulary_makes_the_loss_nan(either_config):
    x, weight, targets = make_inputs(20, 16, 300, torch.float32)
    for bad in (300, -2, 2**40):
        targets[3] = bad
        assert op.linear_cross_entropy(x, weight, targets).isnan()


MUTANTS = {
    "no derivative of the softcap": (("* (1.0 - tanh * tanh)", ""),),
    "no softcap": (("tanh, exp = _softcap_exp(z, softcap)\n        total =",
                    "tanh, exp = z / softcap, tl.exp(z)\n        total ="),),
    "the tail is summed": (("tl.sum(tl.where(offs < V, exp, 0.0))", "tl.sum(exp)"),),
    "no onehot": (("- tl.where(offs == target, 1.0, 0.0)", ""),),
    "ignored tokens have gradients": (("tl.where(counts, 1.0 / total, 0.0)", "1.0 / total"),),
    "ignored tokens are counted": (("return (targets != IGNORED).sum()", "return (targets != 10**6).sum()"),),
    "dx is not scaled": (("dx = dx * scale", "dx = dx * dloss"),),
    "dW is not scaled": (("(dweight * scale)", "(dweight / count)"),),
    "only the last chunk's dW": (("weight_grad(chunk, x[part], dweight)",
                                  "weight_grad(chunk, x[part], dweight.zero_())"),),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail(name, tmp_path):
    wrong = mutant(op, *MUTANTS[name], folder=tmp_path)
    wrong._chunk_rows = lambda vocab_size, device: 16
    with pytest.raises(AssertionError):
        check(wrong, torch.float32, (21, 19, 300), draws=2)


def test_the_check_of_the_other_way_fails_too(tmp_path):
    for edit in (("start + offs, target", "offs, target"), ("sums += tl.where(mask, exp, 0.0)", "sums += exp")):
        wrong = mutant(op, edit, folder=tmp_path)
        wrong._config = lambda V: LOOP
        with pytest.raises(AssertionError):
            check(wrong, torch.float32, (21, 19, 300), draws=2)


def test_a_gradient_that_overwrites_fails(tmp_path):
    wrong = mutant(op, ("ctx.main_grad.addcmul_(", "ctx.main_grad.zero_().addcmul_("), folder=tmp_path)
    inputs = make_inputs(37, 19, 300, torch.float32)
    with pytest.raises(AssertionError):
        check_accumulation(wrong.linear_cross_entropy, op.linear_cross_entropy_ref, inputs, [1], torch.float32)


def test_errors_name_the_argument():
    x, weight, targets = make_inputs(8, 16, 300, torch.float32)
    with pytest.raises(ValueError, match="weight"):
        op.linear_cross_entropy(x, weight[:, :5], targets)
    with pytest.raises(ValueError, match="targets"):
        op.linear_cross_entropy(x, weight, targets[:5])
    with pytest.raises(ValueError, match="targets"):
        op.linear_cross_entropy(x, weight, targets.float())
    with pytest.raises(ValueError, match="softcap"):
        op.linear_cross_entropy(x, weight, targets, softcap=100.0)
    with pytest.raises(ValueError, match="float64"):
        op.linear_cross_entropy(x.double(), weight.double(), targets)


def test_cost_counts_the_chunks():
    assert op.cost(10, 16, 300)[0] == 2 * (10 * (16 + 600) + 16 * 300) + 10 * 12
    assert op.cost(10, 16, 300)[1] + op.cost(10, 16, 300, backward=True)[1] == 10 * 300 * (6 * 16 + 15)


@real_and_small("N, D, V", [(2560, 512, V) for V in (8192, 32768, 50257, 300)], [(40, 24, 300), (40, 24, 257)])
def test_bfloat16(N, D, V, monkeypatch):
    monkeypatch.setattr(op, "_chunk_rows", lambda vocab_size, device: 1024 if N > 1024 else 16)
    check(op, torch.bfloat16, (N, D, V), draws=2 if N > 1024 else 8)
    check_losses(op.linear_cross_entropy, make_inputs(N, D, V, torch.bfloat16))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # infinite on purpose: tanh is then 1
@real_and_small("N, D, V", [(2560, 512, 8192), (1, 512, 131_072)], [(40, 24, 300), (1, 8, 131_072)])
def test_peaked_logits_and_heavy_tails_in_bfloat16(N, D, V):
    check_losses(op.linear_cross_entropy, make_inputs(N, D, V, torch.bfloat16, scale=300.0, ignored=N > 1))
    x, weight, targets = make_inputs(N, D, V, torch.bfloat16, scale=1.0, ignored=N > 1)
    check_losses(op.linear_cross_entropy, [x.float().pow(5).bfloat16(), weight, targets])


@real_and_small("N, D, V", [(2048, 512, 8192)], [(40, 24, 300)])
def test_strided_inputs_in_bfloat16(N, D, V):
    x, weight, targets = make_inputs(N, D + 8, V, torch.bfloat16)
    inputs = [x[:, 3 : D + 3], weight[:, 8:], targets[:, None].expand(N, 2)[:, 0]]
    _, *gradients = compared(op.linear_cross_entropy, op.linear_cross_entropy_ref, [inputs], torch.bfloat16)
    for name, values in zip(("dx", "dweight"), gradients, strict=True):
        assert_as_good(name, *values)


@real_and_small("N, D, V", [(4096, 512, 8192)], [(37, 19, 300)])
def test_bfloat16_main_grad(N, D, V):
    inputs = make_inputs(N, D, V, torch.bfloat16)
    check_accumulation(op.linear_cross_entropy, op.linear_cross_entropy_ref, inputs, [1], torch.bfloat16)


@real_and_small("N, D, V", [(16384, 512, 8192)], [(40, 24, 300)])
def test_the_same_bits_twice(N, D, V):
    inputs = make_inputs(N, D, V, torch.bfloat16)
    runs = [outputs_and_gradients(op.linear_cross_entropy, inputs, torch.bfloat16) for _ in range(2)]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


@real_and_small("rows, V", [(2**18 + 8, 8192), (2**14 + 8, 131_072)], [(40, 300)])
def test_past_two_to_the_31_elements(rows, V):
    """The last rows of more than 2³¹ logits are what they are alone, bit by bit."""
    logits = torch.randn(rows, V, device=DEVICE, dtype=torch.bfloat16)
    targets = torch.randint(0, V, (rows,), device=DEVICE)
    last, losses = logits[-8:].clone(), torch.empty(rows, device=DEVICE)
    op._cross_entropy(logits, targets, losses, op.SOFTCAP, True)
    alone = torch.empty(8, device=DEVICE)
    op._cross_entropy(last, targets[-8:], alone, op.SOFTCAP, True)
    assert torch.equal(losses[-8:], alone)
    assert torch.equal(logits[-8:], last)
