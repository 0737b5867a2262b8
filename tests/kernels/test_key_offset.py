"""The partial key offset: reference, kernels in place, and what could be wrong with them."""

import os
import re
import subprocess
import sys

import pytest
import torch

import kernels
from kernels import rotary_attention, rotary_tables
from kernels.rotary_attention import key_offset, rotary_attention_ref
from kernels.rotary_attention.reference import key_offset_ref
from model import GPTConfig
from tests.helpers.attention_checks import check, random_inputs
from tests.helpers.kernel_checks import DEVICE, mutant, outputs_and_gradients, real_and_small
from tests.helpers.whole_model import check_step, loss_and_gradients
from train.config import ROOT

attention = sys.modules["kernels.rotary_attention"]  # `kernels` has the op under this name


def rows_of(choice, rows: int, monkeypatch) -> None:
    """Puts steps of so many tokens in force. Triton wants powers of two."""
    monkeypatch.setattr(choice, "default", lambda head_dim, dtype: {"ROWS": rows, "num_warps": 4})


@pytest.fixture(autouse=True)
def small_steps(kernels_everywhere, monkeypatch):
    """Interpreted, sequences take several."""
    if DEVICE == "cpu":
        rows_of(key_offset.KEY_OFFSET, 16, monkeypatch)


def spelled_out(k):
    """Channel by channel. [B, T, KVH, head_dim]."""
    head_dim, shifted = k.shape[-1], k.clone()
    for channel in range(head_dim):
        if channel % (head_dim // 2) >= head_dim / 4:
            for t in range(1, k.shape[1]):
                shifted[:, t, :, channel] = k[:, t - 1, :, channel]
    return shifted


@pytest.mark.parametrize(("T", "head_dim"), [(1, 16), (2, 8), (5, 4), (7, 32)])
def test_the_reference_moves_the_slow_pairs_of_keys_alone(T, head_dim):
    H, KVH = 4, 2
    qkv = torch.randn(2, T, (H + 2 * KVH) * head_dim, dtype=torch.float64)
    tables = rotary_tables(T, head_dim)
    heads = qkv.view(2, T, H + 2 * KVH, head_dim)
    k = heads[:, :, H : H + KVH]
    assert torch.equal(key_offset_ref(k), spelled_out(k))
    by_hand = torch.cat([heads[:, :, :H], spelled_out(k), heads[:, :, H + KVH :]], dim=2).flatten(2)
    out = rotary_attention_ref(qkv, *tables, H, T, key_offset=True)
    assert torch.equal(out, rotary_attention_ref(by_hand, *tables, H, T))
    assert torch.equal(out, rotary_attention_ref(qkv, *tables, H, T)) == (T == 1)


def test_slow_is_what_turns_least():
    """The pairs that move are those whose angle from token to token is below that of every pair that stays."""
    head_dim = 32
    moved = (key_offset_ref(torch.arange(2.0)[None, :, None, None].expand(1, 2, 1, head_dim))[0, 1, 0] == 0).view(2, -1)
    assert torch.equal(moved[0], moved[1])  # both coordinates of a pair
    cos, _ = rotary_tables(2, head_dim)
    assert cos[1][moved[0]].min() > cos[1][~moved[0]].max()
    assert moved[0].sum() == head_dim // 4


def test_the_gradient_of_the_reference():
    inputs = [x.cpu().requires_grad_() for x in random_inputs(2, 5, 2, 1, 8, True)]
    tables = rotary_tables(5, 8)
    assert torch.autograd.gradcheck(
        lambda qkv, ve, gate: rotary_attention_ref(qkv, *tables, 2, 3, ve, gate, key_offset=True), inputs
    )


SHAPES = [
    (1, 1, 2, 1, 16, 1, False),
    (2, 1, 2, 2, 32, 0, True),
    (3, 2, 2, 1, 16, 2, True),
    (1, 16, 2, 2, 16, 16, False),  # one step, and nothing left over
    (1, 17, 2, 1, 16, 17, True),
    (2, 37, 4, 2, 32, 37, True),
    (1, 130, 2, 1, 16, 130, False),
    (2, 40, 1, 1, 128, 7, True),
    (1, 33, 3, 1, 64, 1000, False),
]


@pytest.mark.parametrize(("B", "T", "H", "KVH", "head_dim", "window", "has_ve"), SHAPES)
def test_output_and_gradients(B, T, H, KVH, head_dim, window, has_ve):
    check(random_inputs(B, T, H, KVH, head_dim, has_ve), H, window, head_dim, torch.float32, key_offset=True)


@pytest.mark.parametrize("head_dim", attention.HEAD_DIMS)
def test_the_steps_of_the_source(head_dim, monkeypatch):
    monkeypatch.undo()
    kernels.set_ops("triton")
    check(random_inputs(1, 37, 2, 1, head_dim, False), 2, 37, head_dim, torch.float32, key_offset=True)


REAL = [
    (2, 2048, 4, 4, 128, 2048, True, torch.bfloat16),
    (1, 1999, 8, 2, 64, 1999, False, torch.bfloat16),
    (3, 1, 4, 2, 128, 1, True, torch.bfloat16),
    (2, 130, 4, 1, 32, 130, False, torch.bfloat16),
    (1, 700, 2, 2, 16, 700, True, torch.float16),
]
SMALL = [(2, 37, 2, 1, 64, 37, True, torch.bfloat16), (1, 40, 2, 1, 16, 40, False, torch.float16)]


@real_and_small("B, T, H, KVH, head_dim, window, has_ve, dtype", REAL, SMALL)
def test_in_16_bits(B, T, H, KVH, head_dim, window, has_ve, dtype):
    check(random_inputs(B, T, H, KVH, head_dim, has_ve), H, window, head_dim, dtype, draws=2, key_offset=True)


@real_and_small("T, dtype", [(2048, torch.bfloat16)], [(37, torch.float32)])
def test_kernels_only_move(T, dtype):
    """What the forward leaves are the reference's bits, wherever the rows lie; all other columns are untouched."""
    H, KVH, head_dim = 2, 2, 16
    width = (H + 2 * KVH) * head_dim
    wide = torch.randn(T, 3, width + 8, device=DEVICE, dtype=dtype).transpose(0, 1)  # sequences inside tokens
    qkv = wide[..., 8:]
    q, k, v = (x.clone() for x in qkv.split([H * head_dim, KVH * head_dim, KVH * head_dim], dim=-1))
    left = wide[..., :8].clone()
    key_offset.key_offset_fwd_(qkv[..., H * head_dim : (H + KVH) * head_dim], head_dim)
    k = key_offset_ref(k.view(3, T, KVH, head_dim)).flatten(2)
    assert torch.equal(wide, torch.cat([left, q, k, v], dim=-1))


@pytest.mark.parametrize("ops", ["triton", "reference"])
@pytest.mark.parametrize("part", ["fast", "slow"])
def test_who_sees_a_key(ops, part):
    """A change of one token's key moves nothing before it, bit for bit. The slow half speaks for the next token, and
    the first one's for itself too. The first query is not asked: of one key the weight is 1, but for a rounding."""
    kernels.set_ops(ops)
    T, window, head_dim = 35, 3, 16
    tables = rotary_tables(T, head_dim, device=DEVICE)
    qkv = random_inputs(1, T, 1, 1, head_dim, False)[0].float()
    before = rotary_attention(qkv, *tables, 1, window, key_offset=True)
    quarters = [1, 3] if part == "slow" else [0, 2]
    for j in (0, 1, 7, 14, 15, 16, 17, 31, 33, 34):  # at the edges of a step too
        changed = qkv.clone()
        changed[0, j, head_dim : 2 * head_dim].view(4, -1)[quarters] += 1
        moved = (rotary_attention(changed, *tables, 1, window, key_offset=True) != before).any(-1)[0]
        first = j + (part == "slow")
        assert moved[1:].tolist() == [first <= t <= first + window for t in range(1, T)]
        assert j == 0 or not moved[0]


def test_sequences_know_nothing_of_each_other():
    inputs = random_inputs(3, 37, 2, 1, 16, True)
    tables = rotary_tables(37, 16, device=DEVICE)

    def call(qkv, ve, gate):
        return rotary_attention(qkv, *tables, 2, 37, ve, gate, key_offset=True)

    together = outputs_and_gradients(call, inputs, torch.float32)
    out, *gradients = together
    cotangent = torch.randn(out.shape, generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE).bfloat16()
    for b in range(3):
        alone = [x[b : b + 1].float().requires_grad_() for x in inputs]
        result = call(*alone)
        assert torch.equal(result[0], out[b])
        for one, all_of_them in zip(torch.autograd.grad(result, alone, cotangent[b : b + 1].float()), gradients,
                                    strict=True):  # fmt: skip
            assert torch.equal(one[0], all_of_them[b])


def test_the_ends_of_a_sequence():
    """The slow half of the last key is nobody's; that of the first is the first two tokens'."""
    H, KVH, head_dim, T = 2, 2, 16, 40
    tables = rotary_tables(T, head_dim, device=DEVICE)
    qkv = random_inputs(2, T, H, KVH, head_dim, False)[0].float().requires_grad_()
    (dqkv,) = torch.autograd.grad(rotary_attention(qkv, *tables, H, T, key_offset=True).square().sum(), qkv)
    dk = dqkv[..., H * head_dim : (H + KVH) * head_dim].reshape(2, T, KVH, 4, head_dim // 4)
    assert (dk[:, -1, :, 1::2] == 0).all()
    assert (dk[:, -1, :, ::2] != 0).all()
    assert (dk[:, 0, :, 1::2] != 0).all()


def test_the_callers_qkv_is_left_alone_and_its_strides_are_free():
    T, H, KVH, head_dim = 37, 2, 1, 16
    qkv = random_inputs(2, T, H, KVH, head_dim, False)[0].float()
    spread = torch.zeros(T, 2, qkv.shape[-1] + 8, device=DEVICE).transpose(0, 1)[..., : qkv.shape[-1]].copy_(qkv)
    tables = rotary_tables(T, head_dim, device=DEVICE)
    results = []
    for given, overwrite in ((qkv, False), (spread, False), (spread, True)):
        kept = given.clone()
        leaf = given.detach().requires_grad_()
        out = rotary_attention(leaf, *tables, H, T, overwrite=overwrite, key_offset=True)
        assert torch.equal(given, kept) != overwrite
        results.append([out.detach(), *torch.autograd.grad(out, leaf, torch.ones_like(out))])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@real_and_small("B, T, head_dim, dtype", [(64, 2048, 128, torch.bfloat16)], [(2, 40, 16, torch.float32)])
def test_the_same_bits_twice(B, T, head_dim, dtype):
    """And on a GPU those of one step as long as a sequence is, where nothing can come in the wrong order."""
    inputs = random_inputs(B, T, 2, 1, head_dim, True)
    tables = rotary_tables(T, head_dim, device=DEVICE)

    def call(qkv, ve, gate):
        return rotary_attention(qkv, *tables, 2, T, ve, gate, key_offset=True)

    runs = [outputs_and_gradients(call, inputs, dtype) for _ in range(2)]
    with kernels.trying("attention-key-offset", kernels.key_of((head_dim, dtype)), {"ROWS": 64, "num_warps": 4}):
        runs.append(outputs_and_gradients(call, inputs, dtype))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def scaled_gradients(inputs, scale, H):
    """Of qkv, ve and gate, as they come for factors of a norm."""
    tables = rotary_tables(scale.shape[1], inputs[0].shape[-1] // (H + 2), device=DEVICE)

    def call(qkv, ve=None, gate=None):
        gate = None if gate is None else kernels.GradScaled(gate, scale)
        return rotary_attention(kernels.GradScaled(qkv, scale), *tables, H, 30, ve, gate, key_offset=True)

    return outputs_and_gradients(call, inputs, torch.float32)[1:]


def check_scaled(has_ve):
    """Token by token against what comes without a scale."""
    H, T = 2, 37
    inputs = [x for x in random_inputs(2, T, H, 1, 16, has_ve) if x is not None]
    scale = torch.logspace(-3, 2, T, device=DEVICE).expand(2, T).contiguous()
    scale[1] = scale[1].flip(0)
    plain = scaled_gradients(inputs, torch.ones_like(scale), H)
    for value, before, factor in zip(
        scaled_gradients(inputs, scale, H), plain, (scale[..., None], 1.0, scale[..., None]), strict=False
    ):
        torch.testing.assert_close(value, before * factor)


@pytest.mark.parametrize("has_ve", [True, False])
def test_a_gradient_leaves_with_the_scale_of_its_own_token(has_ve):
    check_scaled(has_ve)


FORWARD = "k_ptr + batch.to(tl.int64) * k_stride_b + half * 2 * QUARTER + QUARTER"
BACKWARD = "dk_ptr + batch.to(tl.int64) * dk_stride_b + half * 2 * QUARTER + QUARTER"


def check_plain():
    check(random_inputs(2, 37, 4, 2, 16, True), 4, 37, 16, torch.float32, key_offset=True)


MUTANTS = {
    "forward, the fast half": (f"block = {FORWARD}", f"block = {FORWARD[:-10]}"),
    "forward, not both of a pair": (f"block = {FORWARD}", f"block = {FORWARD.replace('* 2', '* 1')}"),
    "forward, one sequence": (f"block = {FORWARD}", f"block = {FORWARD.replace('batch.to', '0 * batch.to')}"),
    "forward, the token after": ("(t > 0) & (t < seq_len))[:, None]", "t < seq_len - 1)[:, None]",
                                 "rows - k_stride_t", "rows + k_stride_t"),
    "forward, two tokens before": ("(t > 0) & (t < seq_len))", "(t > 1) & (t < seq_len))",
                                   "rows - k_stride_t", "rows - 2 * k_stride_t"),
    "forward, nothing at position 0": ("tl.store(rows, before, mask=mask)",
                                       "tl.store(rows, before, mask=(t < seq_len)[:, None])"),
    "forward, the last token is left": ("(t > 0) & (t < seq_len))", "(t > 0) & (t < seq_len - 1))"),
    "forward, from the start": ("(steps - 1 - step) * ROWS", "step * ROWS"),
    "forward, not to the start": ("range(steps)", "range(steps - 1)"),
    "backward, the fast half": (f"block = {BACKWARD}", f"block = {BACKWARD[:-10]}"),
    "backward, not both of a pair": (f"block = {BACKWARD}", f"block = {BACKWARD.replace('* 2', '* 1')}"),
    "backward, the token before": ("rows + dk_stride_t, mask=follows[:, None]",
                                   "rows - dk_stride_t, mask=(t > 0)[:, None]"),
    "backward, position 0 without the second": ("of_first + after, after", "of_first, after"),
    "backward, position 0 without its own": ("of_first + after, after", "after, after"),
    "backward, every token its own too": ("(t == 0)[:, None], of_first", "(t >= 0)[:, None], of_first"),
    "backward, the last is left": ("mask=(t < seq_len)[:, None]", "mask=follows[:, None]"),
    "backward, from the end": ("first + tl.arange", "(seq_len - 1) // ROWS * ROWS - first + tl.arange"),
    "scale, none": ("after *= ", "0.0 * "),
    "scale, inverted": ("(scale / tl.load(scales + 1, mask=follows, other=1.0))",
                        "(tl.load(scales + 1, mask=follows, other=1.0) / scale)"),
    "scale, the own token's alone": ("(scale / tl.load(scales + 1, mask=follows, other=1.0))", "scale"),
    "scale, the first sequence's": ("grad_scale_ptr + batch.to(tl.int64) * seq_len", "grad_scale_ptr"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_kernel_is_rejected(name, monkeypatch, tmp_path):
    """In steps of 16 tokens, and in one step, where nothing but the numbers can tell."""
    pieces = MUTANTS[name]
    wrong = mutant(key_offset, *zip(pieces[::2], pieces[1::2], strict=True), folder=tmp_path)
    for ops in ("key_offset_fwd_", "key_offset_bwd_"):
        monkeypatch.setattr(attention, ops, getattr(wrong, ops))
    in_order = "from the" in name or "to the start" in name
    for rows in (16,) if in_order else (16, 64):
        rows_of(wrong.KEY_OFFSET, rows, monkeypatch)
        with pytest.raises(AssertionError):
            check_scaled(True) if name.startswith("scale") else check_plain()


def test_the_whole_model_with_fused_norms(monkeypatch):
    """A layer that has it between two that have not, and the last: against the references, and bit by bit with
    recompute."""
    monkeypatch.undo()
    shape = GPTConfig(vocab_size=90, seq_len=11, depth=4, d_model=32, head_dim=16, num_kv_heads=1,
                      window_pattern="SL", key_offset=True)  # fmt: skip
    assert shape.offset_layers == [1, 3]
    check_step(monkeypatch, shape, rows=3, fused_norms=True)
    kept, again = (
        loss_and_gradients("triton", shape, 2, fused_norms=True, recompute=recompute) for recompute in (False, True)
    )
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


# Prints a line for each kernel: L for a load of keys from global memory, B for a barrier, S for a store there.
COMPILED = """
import re, sys
import torch
import kernels
from train.precompile import compiling_only

kernels.set_ops("triton")
with compiling_only(int(sys.argv[1])) as launches:
    qkv = torch.empty(4, 1000, 3 * 512, device="meta", dtype=torch.bfloat16, requires_grad=True)
    tables = kernels.rotary_tables(1000, 128, device="meta")
    scaled = kernels.GradScaled(qkv, torch.empty(4, 1000, device="meta"))
    kernels.rotary_attention(scaled, *tables, 4, 1000, key_offset=True).sum().backward()
for kernel in launches:
    if "key_offset" in kernel.metadata.name:
        found = re.findall(r"(ld\\.global|bar\\.sync|barrier\\.sync|st\\.global)", kernel.asm["ptx"])
        print("".join({"l": "L", "b": "B", "s": "S"}[word[0]] for word in found))
"""


@pytest.mark.parametrize("arch", [80, 90, 120])
def test_compiled_a_barrier_stands_between_loads_and_stores(arch, tmp_path):
    """As in the interpreter every thread of a program has loaded before any stores, no number there shows that it is
    so on a GPU. All loads of a step stand before its barrier, and all stores behind it."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    script = tmp_path / "program.py"
    script.write_text(COMPILED, encoding="utf-8")
    run = subprocess.run([sys.executable, script, str(arch)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    kernels_found = run.stdout.split()
    assert len(kernels_found) == 2
    for kernel in kernels_found:
        assert re.fullmatch("L+B+S+", kernel), kernel
