"""The whole model on its kernels against the whole model on its references: loss, every gradient, one update."""


import pytest
import torch

from model import GPTConfig
from tests.helpers.kernel_checks import exact_bfloat16, real_and_small
from tests.helpers.whole_model import check_step, loss_and_gradients, random_step, update


@pytest.mark.parametrize(("kv_heads", "key_offset"), [(0, False), (1, False), (1, True)],
                         ids=["as many kv heads", "one kv head", "a key offset"])  # fmt: skip
def test_two_layers_on_kernels_are_two_layers_on_references(monkeypatch, kv_heads, key_offset):
    shape = GPTConfig(
        vocab_size=300, seq_len=21, depth=2, d_model=64, head_dim=32, num_kv_heads=kv_heads, window_pattern="S",
        key_offset=key_offset,
    )  # fmt: skip
    check_step(monkeypatch, shape, rows=2)


def test_what_looks_a_token_back_does_so_on_kernels_as_on_references(monkeypatch):
    shape = GPTConfig(vocab_size=60, seq_len=9, depth=2, d_model=32, head_dim=16, smear=True, bigram_rows=2)
    check_step(monkeypatch, shape, rows=2)


@pytest.mark.parametrize("fused_norms", [False, True])
def test_five_heads_on_kernels_are_five_heads_on_references(monkeypatch, fused_norms):
    """A width that is no power of two, its norms in five parts; 5 x 128 at one eighth."""
    shape = GPTConfig(short_window=8, vocab_size=100, seq_len=24, depth=2, d_model=80, head_dim=16, window_pattern="S")
    assert shape.windows == [3, 24]
    check_step(monkeypatch, shape, rows=1, fused_norms=fused_norms)


SMALL = GPTConfig(vocab_size=300, seq_len=21, depth=2, d_model=64, head_dim=32)
REAL = [
    (GPTConfig(), 4),
    (GPTConfig(head_dim=64, num_kv_heads=4, vocab_size=32768, key_offset=True, smear=True, bigram_rows=5), 2),
    (GPTConfig(short_window=8, depth=9, d_model=640, window_pattern="SSSSL"), 2),
]


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
