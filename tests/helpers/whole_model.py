"""A whole model by one implementation of the ops, to be compared with another's: loss, every gradient, one update."""

import dataclasses

import torch

import kernels
from model import GPT, GPTConfig
from tests.helpers.kernel_checks import DEVICE, assert_as_good, baselines, transposed
from train.config import TrainConfig, resolve
from train.optimizer import Optimizer
from train.schedule import StepValues
from train.step import TrainStep

VALUES = StepValues(step=3, lr_multiplier=0.7, momentum=0.9, weight_decay=0.15)


class ShortWindows(GPTConfig):
    """Its short windows are an eighth of a row."""

    @property
    def windows(self) -> list[int]:
        return [self.seq_len // 8 if window < self.seq_len else window for window in super().windows]


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
