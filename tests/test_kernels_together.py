"""The whole model on its kernels against the whole model on its references: loss, every gradient, one update."""

import dataclasses

import pytest
import torch

import kernels
from model import GPT, GPTConfig
from tests.kernel_checks import DEVICE, assert_as_good, baselines, exact_bfloat16, real_and_small, transposed
from train.config import TrainConfig, resolve
from train.optimizer import Optimizer
from train.schedule import StepValues
from train.step import TrainStep

VALUES = StepValues(step=3, lr_multiplier=0.7, momentum=0.9, weight_decay=0.15)


@pytest.fixture(autouse=True)
def _restore_ops():
    yield
    kernels.set_ops(None)


def random_step(shape: GPTConfig, forward_dtype: torch.dtype, device: str = DEVICE) -> TrainStep:
    torch.manual_seed(0)
    model = GPT(shape)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Matrices of the initial size, none of them zero; lm_head large enough that the softcap bends.
            scale = {"wte": 1.0, "lm_head": 0.5, "lambda_r": 1.0, "lambda_0": 0.3}.get(name, shape.d_model**-0.5)
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float32) * scale)
    iterates = {"autocast": True}  # Polar Express's in bf16, whatever this CPU multiplies in
    config = TrainConfig(depth=shape.depth, d_model=shape.d_model, head_dim=shape.head_dim, **iterates)
    model.to(device)
    return TrainStep(model, Optimizer(model, resolve(config, "cpu"), forward_dtype))


def random_batches(shape: GPTConfig, rows: int, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    size = (count, rows, shape.seq_len + 1)
    return list(torch.randint(shape.vocab_size, size, generator=generator, dtype=torch.int32).to(DEVICE))


def loss_and_gradients(ops: str, shape: GPTConfig, rows: int, dtype: torch.dtype = torch.float32, **options):
    """The loss of two micro-steps, that of each token, and the gradients, with `options` of the model."""
    kernels.set_ops(ops)
    step = random_step(shape, dtype)
    vars(step.model).update(options)
    batches = random_batches(shape, rows, 2)
    for tokens in batches:
        step.micro_step(tokens, 2)
    losses = torch.stack([step.token_losses(tokens[:, :-1], tokens[:, 1:]) for tokens in batches])
    return [step.loss, losses, *(p.main_grad.clone() for p in step.model.parameters())]


def update(ops: str, shape: GPTConfig, gradients: list[torch.Tensor], dtype: torch.dtype = torch.float32):
    """By how much these gradients change every parameter. Without decay, which is there or not by a sign."""
    kernels.set_ops(ops)
    step = random_step(shape, dtype)
    masters = step.optimizer.masters.values()
    before = [master.clone() for master in masters]
    for p, gradient in zip(step.model.parameters(), gradients, strict=True):
        p.main_grad.copy_(gradient)
    step.optimizer.set_hyper(dataclasses.replace(VALUES, weight_decay=0.0))
    assert step.update().item()
    return [master - old for master, old in zip(masters, before, strict=True)]


def check_step(monkeypatch, shape: GPTConfig, rows: int, ops: str = "triton", **options) -> None:
    """Loss, gradients and update of a model on `ops` against references. Updates are of the same gradients: AdamW makes
    a whole step of either sign of one near zero."""
    monkeypatch.setattr("train.optimizer.iterate_dtype", lambda *_: torch.get_default_dtype())
    names = [name for name, _ in random_step(shape, torch.float32).model.named_parameters()]

    def in_dtype(function):
        def call(dtype):
            torch.set_default_dtype(dtype)
            try:
                return function(dtype)
            finally:
                torch.set_default_dtype(torch.float32)

        return call

    reference = in_dtype(lambda dtype: loss_and_gradients("reference", shape, rows, dtype))
    truth, results = reference(torch.float64), loss_and_gradients(ops, shape, rows, **options)
    for name, *values in zip(("loss", "losses", *names), results, transposed(baselines(reference)), truth, strict=True):
        assert_as_good(name, *values)

    gradients = results[2:]
    reference = in_dtype(lambda dtype: update("reference", shape, gradients, dtype))
    truth, results = reference(torch.float64), update(ops, shape, gradients)
    for name, *values in zip(names, results, transposed(baselines(reference)), truth, strict=True):
        assert_as_good(f"update of {name}", *values)


@pytest.mark.parametrize("kv_heads", [0, 1], ids=["as many kv heads", "one kv head"])
def test_two_layers_on_kernels_are_two_layers_on_references(monkeypatch, kv_heads):
    shape = GPTConfig(
        vocab_size=300, seq_len=21, depth=2, d_model=64, head_dim=32, num_kv_heads=kv_heads, window_pattern="S"
    )
    check_step(monkeypatch, shape, rows=2)


SMALL = GPTConfig(vocab_size=300, seq_len=21, depth=2, d_model=64, head_dim=32)
REAL = [(GPTConfig(), 4), (GPTConfig(head_dim=64, num_kv_heads=4, vocab_size=32768), 2)]


@real_and_small("shape, rows", REAL, [(SMALL, 2)])
def test_in_bfloat16_kernels_are_as_near_to_the_truth_as_references(shape, rows, monkeypatch):
    """The truth here is the references in fp32, of the same rounded parameters only nearly: so near is near enough."""
    exact_bfloat16(monkeypatch)
    # Of the one mean loss an error is luck: the losses of all tokens speak for it.
    results, references = (loss_and_gradients(ops, shape, rows, torch.bfloat16)[1:] for ops in ("triton", "reference"))
    truths = loss_and_gradients("reference", shape, rows)[1:]
    names = ["losses", *(name for name, _ in random_step(shape, torch.float32).model.named_parameters())]
    for name, value, reference, truth in zip(names, results, references, truths, strict=True):
        error = (value - truth).norm() / truth.norm()
        allowed = (reference - truth).norm() / truth.norm()
        assert error <= 2 * allowed + 2**-8, f"{name}: {error:.2e}, the references' own {allowed:.2e}"
        assert error > 0, f"{name}: the very bits of the truth, so nothing was compared"


@real_and_small("shape, rows", REAL[:1], [(GPTConfig(vocab_size=100, seq_len=9, depth=1, d_model=64, head_dim=32), 1)])
def test_a_step_gives_the_same_bits_twice(shape, rows, monkeypatch):
    exact_bfloat16(monkeypatch)
    once, again = (loss_and_gradients("triton", shape, rows, torch.bfloat16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    once, again = (update("triton", shape, once[2:], torch.bfloat16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
