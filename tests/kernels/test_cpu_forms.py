"""The forms for a CPU compute what the references do: in fp64 to the last digits, whatever the blocks and chunks."""

import dataclasses
from itertools import islice

import pytest
import torch

import kernels
from kernels.cpu import attention, linear_cross_entropy
from model import GPTConfig
from tests.helpers.small_step import CONFIG, endless_batches, make_step
from tests.helpers.whole_model import loss_and_gradients, random_step
from train.schedule import step_values

EXACT = 1e-13  # of the largest element; fp64 has 2e-16


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def rotary_tables(T, head_dim):
    angle = torch.outer(torch.arange(T).double(), 10_000.0 ** (-torch.arange(0, head_dim, 2).double() / head_dim))
    return angle.cos(), angle.sin()  # in fp64: rounded ones would change the norm of what they rotate


def attention_case(B, T, H, KVH, head_dim, window, ve, key_offset=False):
    cos, sin = rotary_tables(T, head_dim)

    def op(qkv, *values):
        return kernels.rotary_attention(qkv, cos, sin, H, window, *values, key_offset=key_offset)

    inputs = [random(B, T, (H + 2 * KVH) * head_dim)]
    return op, inputs + [random(B, T, KVH * head_dim), random(B, T, KVH)] * ve


TARGETS = torch.randint(-1, 33, (150,), generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(33, (3, 7), generator=torch.Generator().manual_seed(0))

CASES = {
    "attention": lambda: attention_case(2, 37, 2, 2, 16, 37, ve=True),
    "attention without values": lambda: attention_case(2, 37, 2, 2, 16, 37, ve=False),
    "attention, a short window": lambda: attention_case(2, 37, 2, 2, 16, 9, ve=True),
    "attention, a window of none but its own": lambda: attention_case(1, 20, 2, 2, 16, 0, ve=False),
    "attention, one key head of four": lambda: attention_case(2, 40, 4, 1, 16, 20, ve=True),
    "attention, two key heads of four": lambda: attention_case(1, 33, 4, 2, 32, 33, ve=True),
    "attention, one token": lambda: attention_case(2, 1, 2, 2, 16, 5, ve=True),
    "attention, key offset": lambda: attention_case(2, 37, 2, 2, 16, 37, ve=True, key_offset=True),
    "attention, key offset, grouped heads": lambda: attention_case(1, 40, 2, 1, 16, 11, ve=False, key_offset=True),
    "attention, key offset, one token": lambda: attention_case(2, 1, 2, 2, 16, 1, ve=False, key_offset=True),
    "rms_norm": lambda: (lambda x: kernels.rms_norm(x), [random(3, 5, 48)]),
    "rms_norm of a mix": lambda: (
        kernels.rms_norm, [random(3, 5, 48), random(3, 5, 48), torch.tensor(1.1).double(), torch.tensor(0.3).double()],
    ),
    "linear": lambda: (kernels.linear, [random(3, 5, 48), random(32, 48)]),
    "linear with residual": lambda: (kernels.linear, [random(3, 5, 48), random(32, 48), random(3, 5, 32)]),
    "qkv_projection": lambda: (lambda x, w: kernels.qkv_projection(x, w)[0], [random(3, 5, 48), random(96, 48)]),
    "qkv_projection with gate": lambda: (kernels.qkv_projection, [random(3, 5, 48), random(96, 48), random(4, 16)]),
    "relu2_mlp": lambda: (kernels.relu2_mlp, [random(3, 5, 48), random(96, 48), random(48, 96), random(3, 5, 48)]),
    "relu2_mlp, recomputed": lambda: (
        lambda *args: kernels.relu2_mlp(*args, recompute=True),
        [random(3, 5, 48), random(96, 48), random(48, 96), random(3, 5, 48)],
    ),
    "norm_relu2_mlp": lambda: (kernels.norm_relu2_mlp, [random(3, 5, 48), random(96, 48), random(48, 96)]),
    "linear_cross_entropy": lambda: (
        lambda x, w: kernels.linear_cross_entropy(4 * x, w, TARGETS), [random(150, 48), random(33, 48)],
    ),
    "embedding": lambda: (lambda *tables: kernels.embedding(TOKENS, tables), [random(33, 48), random(33, 16)]),
}  # fmt: skip


def results(ops, op, inputs, with_main_grad=False):
    """What the op returns, and the gradients of its inputs: as autograd has them, or in `main_grad`, where they are
    added to what is there."""
    kernels.set_ops(ops)
    inputs = [x.clone().requires_grad_() for x in inputs]
    if with_main_grad:
        for x in inputs:
            x.main_grad = torch.ones_like(x)
        leaves, inputs = inputs, [kernels.layer_weight(x) for x in inputs]
    out = op(*inputs)
    out = [out] if isinstance(out, torch.Tensor) else [each for each in out if each is not None]
    generator = torch.Generator().manual_seed(1)
    sum((each * torch.randn(each.shape, generator=generator, dtype=each.dtype)).sum() for each in out).backward()
    return [*out, *(x.main_grad - 1 for x in leaves)] if with_main_grad else [*out, *(x.grad for x in inputs)]


def assert_same(values, truths):
    for i, (value, truth) in enumerate(zip(values, truths, strict=True)):
        assert (value.shape, value.dtype) == (truth.shape, truth.dtype)
        error, size = (value - truth).abs().max(), truth.abs().max()
        assert error <= EXACT * size, f"tensor {i} errs by {error:.1e} of {size:.1e}"


@pytest.mark.parametrize("with_main_grad", [False, True], ids=["autograd", "main_grad"])
@pytest.mark.parametrize("case", CASES)
def test_a_form_is_its_reference(monkeypatch, case, with_main_grad):
    monkeypatch.setattr(attention, "BLOCK", 16)
    monkeypatch.setattr(linear_cross_entropy, "CHUNK", 33 * 128)
    monkeypatch.setattr(linear_cross_entropy, "PART", 33 * 64)
    torch.manual_seed(0)
    op, inputs = CASES[case]()
    assert_same(*(results(ops, op, inputs, with_main_grad) for ops in ("cpu", "reference")))


def test_losses_of_tokens_without_gradients():
    torch.manual_seed(0)
    x, weight = random(150, 48), random(33, 48)
    for reduction in ("mean", "none"):
        losses = []
        for ops in ("cpu", "reference"):
            kernels.set_ops(ops)
            with torch.no_grad():
                losses.append(kernels.linear_cross_entropy(4 * x, weight, TARGETS, reduction=reduction))
        assert_same(*([loss] for loss in losses))


def test_a_softcap_whose_exponential_overflows_is_an_error():
    kernels.set_ops("cpu")
    with pytest.raises(ValueError, match="softcap 100"):
        kernels.linear_cross_entropy(torch.zeros(2, 8), torch.zeros(4, 8), torch.zeros(2).long(), softcap=100.0)


def test_scores_at_their_bound_do_not_overflow():
    """Queries and keys alike, in the widest head: every score is √head_dim, its largest."""
    kernels.set_ops("cpu")
    cos, sin = kernels.rotary_tables(4, 256)
    qkv = torch.ones(1, 4, 3 * 256, dtype=torch.bfloat16)
    assert torch.allclose(kernels.rotary_attention(qkv, cos, sin, 1, 4).float(), torch.ones(1), atol=1e-2)


# Polar Express in fp32 too, whatever this CPU multiplies in; and a table that decays beside others that do not.
FP32 = dataclasses.replace(CONFIG, autocast=False, wte_decay=0.3)


def steps_of(ops, count, forward_dtype=torch.float32):
    kernels.set_ops(ops)
    step, losses = make_step(forward_dtype=forward_dtype, config=FP32), []
    batches = list(islice(endless_batches(), CONFIG.grad_accum_steps))  # the same every step, to be learned by heart
    for i in range(count):
        losses.append(step(batches, step_values(FP32, i, i / count))[0])
    return step, torch.stack(losses)


def test_twenty_steps_are_those_of_the_references():
    """In fp32, where each sums in its own order: within 1e-3 nats."""
    (_, losses), (_, truths) = (steps_of(ops, 20) for ops in ("cpu", "reference"))
    assert (losses - truths).abs().max() < 1e-3
    assert truths[-1] < truths[0] - 0.1  # it learns: what is compared is not the initial loss alone


def test_an_update_is_that_of_the_references_and_a_rehearsal_is_none():
    ours, truth, rehearsed, untouched = [make_step(config=FP32) for _ in range(4)]
    for step, ops, apply in ((ours, "cpu", True), (truth, "reference", True), (rehearsed, "cpu", False)):
        kernels.set_ops(ops)
        for i in range(3):  # the same gradients: of others Adam's first steps would be those of their signs
            step.optimizer.sums.normal_(generator=torch.Generator().manual_seed(i))
            step.optimizer.set_hyper(step_values(FP32, i, i / 3), apply)
            assert step.update()
    states = [step.optimizer.state() for step in (ours, truth, untouched, rehearsed)]
    for name, state in states[0].items():
        assert (state - states[1][name]).abs().max() <= 1e-5 * states[1][name].abs().max(), name
        assert torch.equal(states[2][name], states[3][name]), name
        assert not torch.equal(state, states[2][name]), name


def test_copies_are_their_masters_rounded():
    step, _ = steps_of("cpu", 2, torch.bfloat16)
    for name, parameter in step.optimizer.parameters.items():
        assert torch.equal(parameter.data, step.optimizer.masters[name].to(parameter.dtype)), name


def test_in_bfloat16_the_forms_are_as_near_to_the_truth_as_the_references():
    shape = GPTConfig(vocab_size=300, seq_len=150, depth=2, d_model=64, head_dim=32)
    results, references = (loss_and_gradients(ops, shape, 2, torch.bfloat16)[1:] for ops in ("cpu", "reference"))
    truths = loss_and_gradients("reference", shape, 2)[1:]
    names = ["losses", *(name for name, _ in random_step(shape, torch.float32).model.named_parameters())]
    for name, value, reference, truth in zip(names, results, references, truths, strict=True):
        error, allowed = ((x.float() - truth).norm() / truth.norm() for x in (value, reference))
        assert 0 < error <= 2 * allowed + 2**-8, f"{name}: {error:.2e}, the references' own {allowed:.2e}"


def test_the_same_bits_twice():
    (once, first), (again, second) = (steps_of("cpu", 3, torch.bfloat16) for _ in range(2))
    assert torch.equal(first, second)
    for name, master in once.optimizer.masters.items():
        assert torch.equal(master, again.optimizer.masters[name]), name
