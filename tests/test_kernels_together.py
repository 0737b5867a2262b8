"""The whole model on its kernels against the whole model on its references: loss, every gradient, one update."""

import pytest
import torch

import kernels
from model import GPT, GPTConfig
from prepare import Batch
from tests.kernel_checks import DEVICE, exact_bfloat16, real_and_small
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
            parameter.copy_(torch.randn(parameter.shape) * scale)
    config = resolve(TrainConfig(depth=shape.depth, d_model=shape.d_model, head_dim=shape.head_dim), "cpu")
    model.to(device)
    return TrainStep(model, Optimizer(model, config, forward_dtype))


def random_batches(shape: GPTConfig, rows: int, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    size = (count, rows, shape.seq_len + 1)
    return list(torch.randint(shape.vocab_size, size, generator=generator, dtype=torch.int32).to(DEVICE))


def losses_gradients_parameters(ops: str, shape: GPTConfig, rows: int, forward_dtype=torch.float32):
    """After two micro-steps and one update, all in the same order for either ops."""
    kernels.set_ops(ops)
    step = random_step(shape, forward_dtype)
    batches = [Batch(tokens, epoch=1, index=i, state={}) for i, tokens in enumerate(random_batches(shape, rows, 2))]
    loss, good = step(batches, VALUES)
    assert good.item()
    gradients = {name: p.main_grad.clone() for name, p in step.model.named_parameters()}
    return loss, gradients, step.optimizer.masters


@pytest.mark.parametrize("kv_heads", [0, 1], ids=["as many kv heads", "one kv head"])
def test_two_layers_on_kernels_are_two_layers_on_references(monkeypatch, kv_heads):
    exact_bfloat16(monkeypatch)  # Polar Express iterates in bf16
    shape = GPTConfig(
        vocab_size=300, seq_len=21, depth=2, d_model=64, head_dim=32, num_kv_heads=kv_heads, window_pattern="S"
    )
    loss, gradients, masters = losses_gradients_parameters("triton", shape, rows=2)
    loss_ref, gradients_ref, masters_ref = losses_gradients_parameters("reference", shape, rows=2)
    torch.testing.assert_close(loss, loss_ref, rtol=1e-5, atol=1e-5)
    start = {name: p.detach().clone() for name, p in random_step(shape, torch.float32).model.named_parameters()}
    for name, reference in gradients_ref.items():
        assert reference.abs().max() > 1e-5, f"{name}: a gradient of zero tests nothing"
        error = (gradients[name] - reference).norm() / reference.norm()
        assert error < 1e-5, f"gradient of {name}: {error:.2e}"
        moved, moved_ref = masters[name] - start[name], masters_ref[name] - start[name]
        # AdamW's first step is a sign where a gradient is near zero, and Muon's iterates are bf16: 2e-2, as for those.
        error = (moved - moved_ref).norm() / moved_ref.norm()
        assert error < 2e-2, f"update of {name}: {error:.2e}"


SMALL = GPTConfig(vocab_size=300, seq_len=21, depth=2, d_model=64, head_dim=32)
REAL = [(GPTConfig(), 4), (GPTConfig(head_dim=64, num_kv_heads=4, vocab_size=32768), 2)]


@real_and_small("shape, rows", REAL, [(SMALL, 2)])
def test_in_bfloat16_kernels_are_as_near_to_the_truth_as_references(shape, rows, monkeypatch):
    """The truth here is the references in fp32, of the same rounded parameters only nearly: so near is near enough."""
    exact_bfloat16(monkeypatch)
    loss, gradients, _ = losses_gradients_parameters("triton", shape, rows, torch.bfloat16)
    loss_ref, gradients_ref, _ = losses_gradients_parameters("reference", shape, rows, torch.bfloat16)
    loss_truth, gradients_truth, _ = losses_gradients_parameters("reference", shape, rows)
    assert (loss - loss_truth).abs() <= 2 * (loss_ref - loss_truth).abs() + 1e-3
    for name, truth in gradients_truth.items():
        error = (gradients[name] - truth).norm() / truth.norm()
        allowed = (gradients_ref[name] - truth).norm() / truth.norm()
        assert error <= 2 * allowed + 2**-8, f"gradient of {name}: {error:.2e}, the references' own {allowed:.2e}"
        assert error > 0, f"gradient of {name}: the very bits of the truth, so nothing was compared"


@real_and_small("shape, rows", REAL[:1], [(GPTConfig(vocab_size=100, seq_len=9, depth=1, d_model=64, head_dim=32), 1)])
def test_a_step_gives_the_same_bits_twice(shape, rows, monkeypatch):
    exact_bfloat16(monkeypatch)
    runs = [losses_gradients_parameters("triton", shape, rows, torch.bfloat16) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0])
    for part, again in zip(runs[0][1:], runs[1][1:], strict=True):
        assert all(torch.equal(part[name], again[name]) for name in part)
