"""The embedding's kernels against the reference in fp64."""

import importlib

import pytest
import torch

from kernels import layer_weight
from kernels.common import set_ops
from tests.kernel_checks import DEVICE, assert_as_good, fill_empty_with_nan, mutant, outputs_and_gradients

op = importlib.import_module("kernels.embedding")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def kernels_everywhere(monkeypatch):
    fill_empty_with_nan(monkeypatch)
    set_ops("triton")
    yield
    set_ops(None)


def make_tokens(vocab_size, shape, kind="frequent"):
    """Frequencies as language has them, or one token almost everywhere. Some tokens never occur."""
    generator = torch.Generator().manual_seed(0)
    size = torch.Size(shape).numel()
    ranks = torch.rand(size, generator=generator).pow(4) * (vocab_size - 1)
    tokens = ranks.int() if kind == "frequent" else torch.full((size,), vocab_size - 1, dtype=torch.int32)
    tokens[:: size // 5] = 0
    return tokens[torch.randperm(size, generator=generator)].view(shape).to(DEVICE)


def make_tables(vocab_size, widths, dtype):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(vocab_size, width, generator=generator).to(DEVICE, dtype) for width in widths]


def check(function, tokens, tables, dtype, truth_dtype=torch.float64):
    def call(f):
        return lambda *tables: f(tokens, tables)

    got, baseline = (outputs_and_gradients(call(f), tables, dtype) for f in (function, op.embedding_ref))
    truth = outputs_and_gradients(call(op.embedding_ref), tables, truth_dtype)
    for index, values in enumerate(zip(got, baseline, truth, strict=True)):
        assert_as_good(f"output or gradient {index}", *values)


def check_one_table(module):
    """Most tokens are one, and the gradient joins what is there already."""
    tokens, (table,) = make_tokens(37, (3, 217), "one"), make_tables(37, [9], torch.float32)
    check(module.embedding, tokens, [table], torch.float32)
    leaf = table.clone().requires_grad_()
    leaf.main_grad = torch.ones_like(table)
    module.embedding(tokens, [leaf])[0].sum().backward()
    assert torch.equal(leaf.main_grad, 1 + torch.bincount(tokens.flatten(), minlength=37)[:, None].expand(37, 9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["frequent", "one"])
def test_outputs_and_gradients(kind, dtype):
    check(op.embedding, make_tokens(37, (3, 217), kind), make_tables(37, [9, 64], dtype), dtype)


@pytest.mark.parametrize("size", [1, 127, 128, 129, 256, 257])
def test_sizes_around_a_piece(size):
    tokens = torch.full((size,), 3, dtype=torch.int64, device=DEVICE)
    check(op.embedding, tokens, make_tables(5, [3], torch.float32), torch.float32)


def test_strided_tokens_and_tables():
    tokens = make_tokens(19, (4, 33))[:, :-1]
    tables = [t[:, 2:12] for t in make_tables(19, [16, 20], torch.float32)]
    check(op.embedding, tokens, tables, torch.float32)


def test_gradients_add_up_in_main_grad_and_some_may_be_absent():
    tokens = make_tokens(11, (2, 300))
    stack = torch.randn(2, 11, 8, device=DEVICE, requires_grad=True)
    unused = torch.randn(11, 4, device=DEVICE, requires_grad=True)
    stack.main_grad, unused.main_grad = torch.ones_like(stack), torch.ones_like(unused)
    exact = stack.detach().double().requires_grad_()
    for scale in (1.0, -0.25):
        a, b, _ = op.embedding(tokens, [layer_weight(stack, 0), layer_weight(stack, 1), layer_weight(unused)])
        (scale * (a * b)).sum().backward()
        a, b = op.embedding_ref(tokens, exact)
        (scale * (a * b)).sum().backward()
    assert stack.grad is None
    torch.testing.assert_close(stack.main_grad.double(), exact.grad + 1, rtol=1e-5, atol=1e-5)
    assert (unused.main_grad == 1).all()


def test_the_kernels_themselves_pass_where_mutants_fail():
    check_one_table(op)


def test_the_same_bits_twice():
    tokens, (table,) = make_tokens(13, (700,)), make_tables(13, [40], torch.float32)
    dout = torch.randn(700, 40, device=DEVICE)

    def gradient(tokens, dout):
        leaf = table.clone().requires_grad_()
        op.embedding(tokens, [leaf])[0].backward(dout)
        return leaf.grad

    assert torch.equal(gradient(tokens, dout), gradient(tokens, dout))


def test_an_unknown_token_reads_nan():
    (table,) = make_tables(4, [8], torch.float32)
    (out,) = op.embedding(torch.tensor([0, 4, -1, 3], device=DEVICE), [table])
    assert out.isnan().all(dim=1).tolist() == [False, True, True, False]


MUTANTS = {
    "the last token is unknown": ("(token < V)\n", "(token < V - 1)\n"),
    "pieces are empty": ("tl.store(partial_ptr + piece.to(tl.int64) * D + offs_d, tl.sum(acc, axis=0)",
                         "tl.store(partial_ptr + piece.to(tl.int64) * D + offs_d, 0.0 * tl.sum(acc, axis=0)"),
    "one piece is lost": ("SPLIT - 1) // SPLIT - 1)\n", "SPLIT - 1) // SPLIT - 2)\n"),
    "a piece runs on past its end": ("end = tl.minimum(begin + SPLIT, last)", "end = last"),
    "a segment's tail is not masked": ("mask = (offs_r < end)[:, None] & (offs_d < D)[None, :]\n        acc",
                                       "mask = (offs_d < D)[None, :]\n        acc"),
    "gradients overwrite": ("tl.load(ptrs, mask=offs_d < D, other=0.0) + tl.sum", "tl.sum"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail(name, tmp_path):
    wrong = mutant(op, MUTANTS[name], folder=tmp_path)
    with pytest.raises(AssertionError):
        check_one_table(wrong)


def test_errors_name_the_argument():
    (table,) = make_tables(4, [8], torch.float32)
    with pytest.raises(ValueError, match="tokens"):
        op.embedding(torch.zeros(3, device=DEVICE), [table])
    with pytest.raises(ValueError, match=r"tables\[1\]"):
        op.embedding(torch.zeros(3, dtype=torch.int32, device=DEVICE), [table, table[:3]])
    with pytest.raises(ValueError, match="stride"):
        op.embedding(torch.zeros(3, dtype=torch.int32, device=DEVICE), [table.T])


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize(("vocab_size", "kind"), [(256, "frequent"), (8192, "one"), (131_072, "frequent")])
def test_bfloat16_at_the_models_shape(vocab_size, kind):
    tokens, tables = make_tokens(vocab_size, (128, 2048), kind), make_tables(vocab_size, [512, 256], torch.bfloat16)
    check(op.embedding, tokens, tables, torch.bfloat16)


@gpu
@pytest.mark.gpu
def test_past_two_to_the_31_elements():
    tokens = torch.zeros(2**22 + 3, dtype=torch.int32, device=DEVICE)
    tokens[-3:] = torch.tensor([1, 2, 1])
    table = torch.randn(3, 512, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    (out,) = op.embedding(tokens, [table])
    assert torch.equal(out[-3:], table[[1, 2, 1]])
    dout = torch.zeros_like(out)
    dout[-3:] = torch.randn(3, 512, device=DEVICE)
    out.backward(dout)
    assert torch.equal(table.grad[2], dout[-2])
    assert not table.grad[0].any()
