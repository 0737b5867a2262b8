"""The embedding's kernels against the reference in fp64."""

import importlib

import pytest
import torch

from kernels import layer_weight
from tests.helpers.kernel_checks import DEVICE, assert_as_good, compared, mutant, real_and_small

pytestmark = pytest.mark.usefixtures("kernels_everywhere")
op = importlib.import_module("kernels.embedding")


def make_tokens(vocab_size, shape, kind="frequent"):
    """Frequencies as language has them, or one token almost everywhere. Some tokens never occur."""
    generator = torch.Generator().manual_seed(0)
    size = torch.Size(shape).numel()
    ranks = torch.rand(size, generator=generator).pow(4) * (vocab_size - 1)
    tokens = ranks.int() if kind == "frequent" else torch.full((size,), vocab_size - 1, dtype=torch.int32)
    tokens[size // 2 :: size // 5 + 1] = 0 if size > 1 else vocab_size - 1
    return tokens[torch.randperm(size, generator=generator)].view(shape).to(DEVICE)


def make_tables(vocab_size, widths, dtype):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(vocab_size, width, generator=generator).to(DEVICE, dtype) for width in widths]


def check(function, tokens, tables, dtype, draws=1):
    """Of several cotangents, because the largest error is that of a few frequent tokens."""
    functions = [lambda *t, f=f: f(tokens, t) for f in (function, op.embedding_ref)]
    for index, values in enumerate(compared(*functions, [tables] * draws, dtype)):
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
    check(op.embedding, make_tokens(37, (3, 217), kind), make_tables(37, [9, 20, 160], dtype), dtype, draws=4)


@pytest.mark.parametrize("size", [1, 127, 128, 129, 256, 257])
def test_sizes_around_a_piece(size):
    tokens = torch.full((size,), 3, dtype=torch.int64, device=DEVICE)
    check(op.embedding, tokens, make_tables(5, [3], torch.float32), torch.float32)


@real_and_small("shape, dtype", [((8, 2049), torch.bfloat16)], [((4, 33), torch.float32)])
def test_strided_tokens_and_tables(shape, dtype):
    tokens = make_tokens(19, shape)[:, :-1]
    tables = [t[:, 2:12] for t in make_tables(19, [16, 20], dtype)]
    check(op.embedding, tokens, tables, dtype)


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


@real_and_small("size, D, dtype", [(2**18, 512, torch.bfloat16)], [(700, 40, torch.float32)])
def test_the_same_bits_twice(size, D, dtype):
    tokens, (table,) = make_tokens(13, (size,)), make_tables(13, [D], dtype)
    dout = torch.randn(size, D, device=DEVICE, dtype=dtype)

    def gradient(tokens, dout):
        leaf = table.clone().requires_grad_()
        op.embedding(tokens, [leaf])[0].backward(dout)
        return leaf.grad

    assert torch.equal(gradient(tokens, dout), gradient(tokens, dout))


def test_an_unknown_token_reads_nan():
    (table,) = make_tables(4, [8], torch.float32)
    (out,) = op.embedding(torch.tensor([0, 4, -1, 3, 2**32, 2 - 2**40], device=DEVICE), [table])
    assert out.isnan().all(dim=1).tolist() == [False, True, True, False, True, True]


def test_an_unknown_token_has_no_gradient():
    (table,) = make_tables(4, [8], torch.float32)
    (out,) = op.embedding(torch.tensor([5, 0, -1, 3, 2**33, 3], device=DEVICE), [table.requires_grad_()])
    out.sum().backward()
    assert table.grad[:, 0].tolist() == [1, 0, 0, 2]


MUTANTS = {
    "the last token is unknown": ("(token < V)\n", "(token < V - 1)\n"),
    "pieces are empty": ("tl.store(partial_ptr + piece.to(tl.int64) * D + offs_d, tl.sum(acc, axis=0)",
                         "tl.store(partial_ptr + piece.to(tl.int64) * D + offs_d, 0.0 * tl.sum(acc, axis=0)"),
    "one piece is lost": ("SPLIT - 1) // SPLIT - 1)\n", "SPLIT - 1) // SPLIT - 2)\n"),
    "a piece runs on past its end": ("end = tl.minimum(begin + SPLIT, last)", "end = last"),
    "a segment's tail is not masked": ("mask = (offs_r < end)[:, None] & (offs_d < D)[None, :]\n        acc",
                                       "mask = (offs_d < D)[None, :]\n        acc"),
    "a gradient is scaled": ("other=0.0) + tl.sum(acc, axis=0)", "other=0.0) + 0.99 * tl.sum(acc, axis=0)"),
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


REAL = [(256, (128, 2048), "frequent", [512, 256]), (8192, (128, 2048), "one", [512, 256])]
REAL += [(131_072, (128, 2048), "frequent", [512, 256]), (50_257, (1, 1), "frequent", [768])]
SMALL = [(37, (3, 70), "frequent", [24, 9]), (37, (1, 300), "one", [8]), (131_072, (1, 1), "one", [2])]


@real_and_small("vocab_size, shape, kind, widths", REAL, SMALL)
def test_bfloat16(vocab_size, shape, kind, widths):
    tokens, tables = make_tokens(vocab_size, shape, kind), make_tables(vocab_size, widths, torch.bfloat16)
    if vocab_size == 131_072 and DEVICE == "cpu":  # a program for each row of a table takes the interpreter too long
        with torch.no_grad():
            assert torch.equal(op.embedding(tokens, tables)[0], tables[0][tokens.long()])
        return
    check(op.embedding, tokens, tables, torch.bfloat16)


@real_and_small("size, D", [(2**22 + 3, 512)], [(515, 8)])
def test_past_two_to_the_31_elements(size, D):
    tokens = torch.zeros(size, dtype=torch.int32, device=DEVICE)
    tokens[-3:] = torch.tensor([1, 2, 1])
    table = torch.randn(3, D, device=DEVICE).bfloat16().requires_grad_()
    (out,) = op.embedding(tokens, [table])
    assert torch.equal(out[-3:], table[[1, 2, 1]])
    dout = torch.zeros_like(out)
    dout[-3:] = torch.randn(3, D, device=DEVICE)
    out.backward(dout)
    assert torch.equal(table.grad[2], dout[-2])
    assert not table.grad[0].any()
