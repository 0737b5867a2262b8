"""The optimizer's groups, and one step of each kind against formulas written out here."""

import dataclasses
import math
import sys

import pytest
import torch

from kernels.muon import muon_update_ref, second_moment_shape
from kernels.polar_express import COEFFICIENTS
from model import GPT, GPTConfig
from model.gpt import SCALARS
from prepare import InputError
from train.config import TrainConfig, resolve
from train.optimizer import AdamWGroup, MuonGroup, Optimizer
from train.schedule import StepValues
from train.tune import problems
from train.tune.ops import Op

SHAPE = GPTConfig(vocab_size=300, seq_len=16, depth=2, d_model=64, head_dim=16, num_kv_heads=2)


def make(shape: GPTConfig = SHAPE, forward_dtype=torch.float32, seed: int = 0, **options) -> tuple[GPT, Optimizer]:
    torch.manual_seed(seed)
    model = GPT(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    config = TrainConfig(depth=2, embedding_lr=0.6, scalar_lr=0.5, matrix_lr=0.04, **options)
    optimizer = Optimizer(model, resolve(config, "cpu"), forward_dtype)
    for parameter in model.parameters():
        parameter.main_grad.copy_(torch.randn(parameter.shape))
    return model, optimizer


VALUES = StepValues(step=0, lr_multiplier=0.7, momentum=0.9, weight_decay=0.15)
GOOD = torch.tensor(1.0)


def test_what_looks_a_token_back_has_groups_where_there_is_any():
    _, optimizer = make(dataclasses.replace(SHAPE, smear=True, bigram_rows=2), bigram_decay=0.07)
    groups = {g.names[0]: g for g in optimizer.groups if isinstance(g, AdamWGroup)}
    smear, pairs = groups["lambda_s"], groups["bigram_embeddings"]
    assert (smear.lr, smear.betas, smear.decay) == (0.5, (0.8, 0.95), 0.0)
    assert (pairs.lr, pairs.betas, pairs.decay) == (groups["wte"].lr, (0.8, 0.95), 0.07)


def test_every_parameter_is_in_one_group_with_its_rate():
    model, optimizer = make()
    scale = (64 / 768) ** -0.5
    adamw = {n: g for g in optimizer.groups if isinstance(g, AdamWGroup) for n in g.names}
    muon = [g for g in optimizer.groups if isinstance(g, MuonGroup)]
    assert {n: round(g.lr, 6) for n, g in adamw.items()} == {
        "lm_head": round(0.004 * scale, 6), "wte": round(0.6 * scale, 6), "value_embeddings": round(0.6 * scale, 6),
        "lambda_r": 0.005, "lambda_0": 0.5,
    }  # fmt: skip
    assert {n: g.betas for n, g in adamw.items()} == {
        n: (0.96, 0.95) if n == "lambda_0" else (0.8, 0.95) for n in adamw
    }
    shapes = sorted((g.name, tuple(g.master.shape), round(g.lr, 6)) for g in muon)
    assert shapes == [
        ("w_fc", (2, 256, 64), 0.08),  # sqrt(256 / 64) = 2
        ("w_gate", (1, 2, 32), 0.04),
        ("w_out", (2, 64, 64), 0.04),
        ("w_proj", (2, 64, 256), 0.04),
        ("w_qkv", (2, 32, 64), 0.04),  # k
        ("w_qkv", (2, 32, 64), 0.04),  # v
        ("w_qkv", (2, 64, 64), 0.04),  # q
    ]
    covered = sum(m.numel() for g in optimizer.groups if isinstance(g, AdamWGroup) for m in g.masters)
    assert covered + sum(g.master.numel() for g in muon) == sum(p.numel() for p in model.parameters())


def test_a_parameter_in_no_group_is_refused(monkeypatch):
    """It would keep its initial values for ever, and nobody would notice."""
    monkeypatch.setattr("train.optimizer.BLOCK_WEIGHTS", ("w_qkv", "w_out", "w_fc", "w_gate"))
    with pytest.raises(InputError, match=r"no group updates w_proj:.*BLOCK_WEIGHTS"):
        make()


def test_q_k_and_v_are_three_matrices_also_where_they_are_alike():
    _, optimizer = make(GPTConfig(vocab_size=300, seq_len=16, depth=2, d_model=64, head_dim=16))
    batch = next(g for g in optimizer.groups if isinstance(g, MuonGroup) and g.name == "w_qkv")
    assert batch.master.shape == (6, 64, 64)


@pytest.mark.parametrize("name", ["wte", "lambda_0"])
@pytest.mark.parametrize("step", [0, 7])
def test_one_adamw_step(name, step):
    model, optimizer = make()
    group = next(g for g in optimizer.groups if isinstance(g, AdamWGroup) and name in g.names)
    i = group.names.index(name)
    torch.manual_seed(9)
    group.exp_avgs[i].normal_()
    group.exp_avg_sqs[i].uniform_(0.1, 1)
    w, g = getattr(model, name).detach().double().clone(), getattr(model, name).main_grad.double().clone()
    m, v = group.exp_avgs[i].double().clone(), group.exp_avg_sqs[i].double().clone()

    optimizer.set_hyper(StepValues(step=step, lr_multiplier=0.7, momentum=0.9, weight_decay=0.15))
    assert optimizer.update(GOOD).item()

    b1, b2 = (0.96, 0.95) if name == "lambda_0" else (0.8, 0.95)
    lr = 0.7 * (0.5 if name == "lambda_0" else 0.6 * math.sqrt(768 / 64))
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g * g
    expected = w - lr * (m / (1 - b1 ** (step + 1))) / ((v / (1 - b2 ** (step + 1))).sqrt() + 1e-10)
    torch.testing.assert_close(getattr(model, name).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(group.exp_avgs[i].double(), m, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(group.exp_avg_sqs[i].double(), v, rtol=1e-5, atol=1e-6)


def test_each_table_has_its_own_decay_at_the_rate_of_the_step():
    """What a decay takes beside the update: lr x decay of the weight, whose lr is the scheduled one."""
    decays = {"lm_head": 0.02, "wte": 0.03, "value_embeddings": 0.05}
    (model, plain), (decayed, optimizer) = make(), make(
        lm_head_decay=0.02, wte_decay=0.03, value_embedding_decay=0.05
    )  # fmt: skip
    before = {n: m.clone() for n, m in plain.masters.items()}
    for each in (plain, optimizer):
        each.set_hyper(VALUES)
        each.update(GOOD)
    for name, weight in model.named_parameters():
        lr = (0.004 if name == "lm_head" else 0.6) * math.sqrt(768 / 64)
        expected = weight.detach().double() - 0.7 * lr * decays.get(name, 0.0) * before[name].double()
        got = getattr(decayed, name).detach()
        if name in decays:
            torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)
            assert not torch.allclose(got, weight, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(got, weight), name


def polar_by_hand(g):
    x = g / (1.02 * g.norm() + 1e-6)
    x = x.T if g.shape[0] > g.shape[1] else x
    for a, b, c in COEFFICIENTS:
        A = x @ x.T
        x = a * x + (b * A + c * A @ A) @ x
    return x.T if g.shape[0] > g.shape[1] else x


def muon_by_hand(w, g, momentum, second, lr, mu, wd):
    """One matrix, straight from the design's table. Returns what replaces w, momentum and second moment."""
    rows, cols = w.shape
    momentum = mu * momentum + (1 - mu) * g
    u = polar_by_hand((1 - mu) * g + mu * momentum)
    v = u.pow(2).mean(dim=1 if rows >= cols else 0, keepdim=True)
    second = 0.95 * second + 0.05 * v
    s = second.clamp(min=1e-10) ** -0.5
    update = u * s * (u.norm() / (u * s).norm())
    decay = torch.where(update * w >= 0, w, torch.zeros_like(w))
    return w - lr * update - lr * wd * decay, momentum, second


@pytest.mark.parametrize("name", ["w_fc", "w_proj", "w_out", "w_gate"])
def test_one_muon_step(name, monkeypatch):
    # bf16 iterates have a test of their own; here exact ones show whether all else is exact.
    exact = sys.modules["kernels.muon"].polar_express_ref
    monkeypatch.setattr(
        sys.modules["kernels.muon"], "polar_express_ref", lambda g, dtype: exact(g.double(), torch.float64)
    )
    model, optimizer = make()
    group = next(g for g in optimizer.groups if isinstance(g, MuonGroup) and g.name == name)
    torch.manual_seed(9)
    group.momentum.normal_()
    group.second_moment.uniform_(0.01, 0.1)
    before = [t.clone() for t in (group.master, group.grad, group.momentum, group.second_moment)]
    optimizer.set_hyper(VALUES)
    assert optimizer.update(GOOD).item()
    lr = 0.7 * 0.04 * math.sqrt(max(1, group.master.shape[1] / group.master.shape[2]))
    for i, (w, g, momentum, second) in enumerate(zip(*before, strict=True)):
        w, g, momentum, second = (t.double() for t in (w, g, momentum, second))
        expected = muon_by_hand(w, g, momentum, second, lr, mu=0.9, wd=0.15)
        for got, want in zip((group.master[i], group.momentum[i], group.second_moment[i]), expected, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    assert torch.equal(getattr(model, name), group.master)  # fp32: parameter and master are one tensor


def test_one_muon_step_with_exact_iterates():
    """As above with fp64 iterates, where nothing hides behind bf16's rounding: decay and variance to the last digit."""
    torch.manual_seed(3)
    for shape in [(2, 24, 24), (2, 40, 16), (2, 16, 40)]:
        w, g, momentum = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
        second = torch.rand(second_moment_shape(shape), dtype=torch.float64)
        before = [t.clone() for t in (w, g, momentum, second)]
        hyper = torch.tensor([0.03, 0.9, 0.15], dtype=torch.float64)
        muon_update_ref(w, g, momentum, second, None, hyper, torch.tensor(True), torch.float64)
        for i, matrix in enumerate(zip(*before, strict=True)):
            expected = muon_by_hand(*matrix, lr=0.03, mu=0.9, wd=0.15)
            for got, want in zip((w[i], momentum[i], second[i]), expected, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_16_bit_parameters_are_their_masters_rounded():
    model, optimizer = make(forward_dtype=torch.bfloat16)
    for _ in range(2):
        for name, parameter in model.named_parameters():
            scalar = name in SCALARS
            assert parameter.dtype == (torch.float32 if scalar else torch.bfloat16)
            assert optimizer.masters[name].dtype == parameter.main_grad.dtype == torch.float32
            assert torch.equal(parameter, optimizer.masters[name].to(parameter.dtype)), name
        before = {n: m.clone() for n, m in optimizer.masters.items()}
        optimizer.set_hyper(VALUES)
        optimizer.update(GOOD)
        assert all(not torch.equal(before[n], m) for n, m in optimizer.masters.items())


def everything(optimizer: Optimizer) -> list[torch.Tensor]:
    state = [*optimizer.masters.values(), *(p.data for p in optimizer.parameters.values())]
    for group in optimizer.groups:
        state += [*group.exp_avgs, *group.exp_avg_sqs] if isinstance(group, AdamWGroup) else [
            group.momentum, group.second_moment
        ]  # fmt: skip
    return state


@pytest.mark.parametrize("bad", ["nan loss", "loss 101", "inf gradient", "nan gradient", "rehearsal"])
def test_a_bad_step_changes_nothing(bad):
    model, optimizer = make(forward_dtype=torch.bfloat16)
    before = [t.clone() for t in everything(optimizer)]
    loss = {"nan loss": torch.tensor(math.nan), "loss 101": torch.tensor(101.0)}.get(bad, GOOD)
    if bad.endswith("gradient"):
        model.w_fc.main_grad[1, 3, 4] = math.inf if bad.startswith("inf") else math.nan
    optimizer.set_hyper(VALUES, apply=bad != "rehearsal")
    good = optimizer.update(loss)
    assert good.item() == (bad == "rehearsal")
    assert all(torch.equal(a, b) for a, b in zip(before, everything(optimizer), strict=True))


def test_no_step_after_a_bad_one_is_taken():
    """The host reads the loss late: what it has sent by then must find the parameters as the good steps left them."""
    _, optimizer = make(forward_dtype=torch.bfloat16)
    optimizer.set_hyper(VALUES, apply=False)
    assert not optimizer.update(torch.tensor(math.nan)).item()  # a rehearsal has no say
    optimizer.set_hyper(VALUES)
    assert optimizer.update(GOOD).item()
    before = [t.clone() for t in everything(optimizer)]
    for loss in (torch.tensor(math.nan), GOOD):
        optimizer.set_hyper(VALUES)
        assert not optimizer.update(loss).item()
    assert all(torch.equal(a, b) for a, b in zip(before, everything(optimizer), strict=True))


def test_gradients_are_views_of_one_buffer():
    model, optimizer = make()
    optimizer.grads.fill_(2.0)
    assert all((p.main_grad == 2).all() for p in model.parameters())
    optimizer.zero_grad()
    assert not any(p.main_grad.any() for p in model.parameters())
    assert all(p.main_grad.data_ptr() % 128 == optimizer.grads.data_ptr() % 128 for p in model.parameters())


def test_iterates_are_bf16_but_on_a_cpu_without_its_instructions():
    for autocast, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        model = GPT(GPTConfig(depth=2, d_model=32, head_dim=16, vocab_size=64))
        groups = Optimizer(model, resolve(TrainConfig(autocast=autocast), "cpu")).groups
        assert {group.iterate_dtype for group in groups if isinstance(group, MuonGroup)} == {dtype}


@pytest.mark.parametrize(("has_bf16", "iterates"), [(False, torch.float32), (True, torch.bfloat16)])
def test_muon_is_measured_as_this_cpu_runs_it(monkeypatch, has_bf16, iterates):
    monkeypatch.setattr(problems, "cpu_has_bf16", lambda: has_bf16)
    shape = 2, 16, 24
    polar, muon = Op("polar", 1, "polar_express", shape), Op("muon", 1, "muon", (math.prod(shape),), shape=shape)
    assert problems.build(polar, "cpu", torch.float32).constants["dtype"] == iterates
    assert problems.build(muon, "cpu", torch.float32).constants["iterate_dtype"] == iterates
