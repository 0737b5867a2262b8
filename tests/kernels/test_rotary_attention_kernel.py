"""rotary_attention's kernels: interpreted at small odd shapes on a CPU, in bf16 at the real ones on a GPU."""

import math

import pytest
import torch

from kernels.common import EPS
from kernels.rotary_attention import (
    backward,
    forward,
    prologue,
    rotary_attention,
    rotary_attention_ref,
    rotary_tables,
    rows,
    tiles,
)
from kernels.rotary_attention.tiles import Config, Rows, Tiles
from tests.helpers.attention_checks import check, mutated, random_inputs
from tests.helpers.kernel_checks import DEVICE, assert_as_good, baselines, outputs_and_gradients, real_and_small
from tests.helpers.visited_tiles import visited_tiles

real_config = tiles.config
SMALL_TILES = Config(Rows(8, 4), Tiles(32, 16, 4, 1), Tiles(16, 32, 4, 1), Tiles(16, 32, 4, 1))
TMA_TILES = SMALL_TILES._replace(
    forward=Tiles(32, 16, 4, 1, tma=True), dq=Tiles(16, 32, 4, 1, tma=True), dkv=Tiles(16, 32, 4, 1, tma=True)
)


@pytest.fixture(autouse=True)
def small_tiles(kernels_everywhere, monkeypatch):
    """Interpreted, kernels have tiles small against T."""
    if DEVICE == "cpu":
        monkeypatch.setattr(tiles, "config", lambda head_dim, dtype, num_heads: SMALL_TILES)


@pytest.mark.parametrize(
    ("B", "T", "H", "KVH", "head_dim", "window", "has_ve"),
    [
        (2, 33, 2, 1, 32, 16, True),
        (1, 100, 1, 1, 128, 50, False),
        (1, 7, 4, 2, 16, 7, True),
        (1, 1, 2, 2, 32, 0, True),
        (1, 50, 2, 2, 16, 0, False),
        (1, 50, 3, 1, 16, 1, True),
        (1, 64, 5, 5, 16, 8, True),  # five heads, and an eighth of the row
        (1, 49, 2, 1, 32, 1000, True),
        (1, 20, 2, 1, 16, 1000, True),  # shorter than a tile of queries, in a window wider than any tile
    ],
)
@pytest.mark.parametrize("tma", [False, True])
def test_output_and_gradients(B, T, H, KVH, head_dim, window, has_ve, tma, monkeypatch):
    if tma:
        monkeypatch.setattr(tiles, "config", lambda head_dim, dtype, num_heads: TMA_TILES)
    check(random_inputs(B, T, H, KVH, head_dim, has_ve), H, window, head_dim, torch.float32)


@pytest.mark.parametrize("kind", ["base", "stride", "sequences inside tokens"])
def test_rows_that_the_accelerator_cannot_take_are_loaded_by_pointers(kind, monkeypatch):
    monkeypatch.setattr(tiles, "config", lambda head_dim, dtype, num_heads: TMA_TILES)
    T, width = 40, 3 * 2 * 16
    qkv = random_inputs(2, T, 2, 2, 16, False)[0].float()
    moved = {
        "base": torch.zeros(2, T, width + 4)[..., 1 : 1 + width],
        "stride": torch.zeros(2, T, width + 1)[..., :width],
        "sequences inside tokens": torch.zeros(T, 2, width).transpose(0, 1),
    }[kind].copy_(qkv)
    assert rows.fits_tma(qkv)
    assert not rows.fits_tma(moved)
    tables = rotary_tables(T, 16)
    out = rotary_attention(moved, *tables, 2, 18, overwrite=True)
    assert torch.equal(out, rotary_attention(qkv, *tables, 2, 18))


@pytest.mark.parametrize(("T", "H", "KVH", "head_dim", "window", "has_ve"), [
    (33, 2, 1, 64, 16, True),
    (40, 1, 1, 128, 40, False),
])  # fmt: skip
def test_output_and_gradients_fp16(T, H, KVH, head_dim, window, has_ve):
    check(random_inputs(1, T, H, KVH, head_dim, has_ve), H, window, head_dim, torch.float16)


def test_tiles_wider_than_long(monkeypatch):
    shapes = Config(Rows(4, 4), Tiles(16, 32, 4, 1), Tiles(32, 16, 4, 1), Tiles(32, 16, 4, 1))
    monkeypatch.setattr(tiles, "config", lambda head_dim, dtype, num_heads: shapes)
    check(random_inputs(1, 100, 2, 1, 16, True), 2, 37, 16, torch.float32)


def brute_force(qkv, ve, gate, H, KVH, head_dim, window):
    """The docstring's formulas again, one query at a time in fp64."""
    B, T, _ = qkv.shape
    heads = qkv.view(B, T, -1, head_dim)
    half = torch.arange(head_dim // 2, device=qkv.device, dtype=torch.float64)
    out = torch.zeros(B, T, H, head_dim, device=qkv.device, dtype=torch.float64)

    def rotated(x, t):
        angle = t * 10_000.0 ** (-2 * half / head_dim)
        x1, x2 = x[: head_dim // 2], x[head_dim // 2 :]
        y = torch.cat([x1 * angle.cos() + x2 * angle.sin(), x2 * angle.cos() - x1 * angle.sin()])
        return y / (y.square().mean() + EPS).sqrt()

    for b in range(B):
        for h in range(H):
            kv = h * KVH // H
            k = [rotated(heads[b, t, H + kv], t) for t in range(T)]
            v = [heads[b, t, H + KVH + kv] for t in range(T)]
            if ve is not None:
                embedded = ve.view(B, T, KVH, head_dim)
                v = [v[t] + 2 / (1 + (-gate[b, t, kv]).exp()) * embedded[b, t, kv] for t in range(T)]
            for t in range(T):
                q = rotated(heads[b, t, h], t)
                seen = [j for j in range(T) if j <= t and t - j <= window]
                p = torch.stack([q @ k[j] for j in seen]).div(math.sqrt(head_dim)).softmax(0)
                out[b, t, h] = sum(p[i] * v[j] for i, j in enumerate(seen))
    return out.flatten(2)


@pytest.mark.parametrize("window", [0, 1, 9, 19])
def test_against_the_formula(window):
    inputs = random_inputs(1, 19, 4, 2, 16, True)
    cos, sin = rotary_tables(19, 16, device=DEVICE)
    truth = brute_force(*inputs, H=4, KVH=2, head_dim=16, window=window)

    def reference(dtype):
        qkv, ve, gate = (x.to(dtype) for x in inputs)
        return rotary_attention_ref(qkv, cos, sin, 4, window, ve, gate)

    torch.testing.assert_close(reference(torch.float64), truth, rtol=0, atol=1e-6)  # its tables are fp32
    qkv, ve, gate = (x.float() for x in inputs)
    assert_as_good("out", rotary_attention(qkv, cos, sin, 4, window, ve, gate), baselines(reference), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sign", [1, -1, 0])
def test_extreme_scores(sign, dtype):
    """Queries along their keys (the largest score there is), against them (the smallest), and zero."""
    inputs = random_inputs(4, 20, 1, 1, 128, False)
    heads = inputs[0].view(4, 20, 3, 128)
    heads[:, :, 1] = heads[:, :1, 1]
    heads[:, :, 0] = sign * heads[:, :, 1]
    check(inputs, 1, 9, 128, dtype)


@real_and_small("T, dtype", [(333, torch.bfloat16)], [(21, torch.float32)])
def test_strided_inputs(T, dtype):
    qkv, ve, gate = (x.to(dtype) for x in random_inputs(2, T, 2, 2, 16, True))
    cos, sin = rotary_tables(T + 9, 16, device=DEVICE)
    wide = [torch.cat([x, x[..., :8].expand(2, T, -1)], dim=-1).transpose(0, 1).contiguous() for x in (qkv, ve, gate)]
    views = [w.transpose(0, 1)[..., : x.shape[-1]] for w, x in zip(wide, (qkv, ve, gate), strict=True)]
    assert not any(x.is_contiguous() for x in views)
    for has_ve in (True, False):
        results = []
        for inputs in ((qkv, ve, gate), views):
            leaves = [x.detach().requires_grad_() for x in (inputs if has_ve else inputs[:1])]
            out = rotary_attention(leaves[0], cos, sin, 2, 9, *leaves[1:])
            weight = torch.arange(1.0, 33.0, device=DEVICE, dtype=dtype)
            expanded = weight.expand_as(out)  # a gradient with strides of 0
            results.append([out, *torch.autograd.grad(out, leaves, expanded)])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


@real_and_small("T, head_dim", [(333, 128)], [(21, 16)])
@pytest.mark.parametrize("part", ["all of it", "its key"])
def test_a_token_that_is_not_a_number_is_found(part, T, head_dim):
    """On a GPU a NaN is all ones, and as a weight rounds to 0: then it is the query's own row, or dQ, that says so."""
    qkv = random_inputs(1, T, 1, 1, head_dim, False)[0].bfloat16()
    qkv[0, T // 2, slice(None) if part == "all of it" else slice(head_dim, 2 * head_dim)] = float("nan")
    cos, sin = rotary_tables(T, head_dim, device=DEVICE)
    out = rotary_attention(qkv.requires_grad_(), cos, sin, 1, T)
    (dqkv,) = torch.autograd.grad(out.sum(), qkv)
    assert not dqkv.isfinite().all()
    if part == "all of it":
        assert out[0, T // 2].isnan().all()


REPEATED = [(8, 2048, 128, 1024, torch.bfloat16)]


@real_and_small("B, T, head_dim, window, dtype", REPEATED, [(1, 33, 16, 9, torch.float32)])
def test_the_same_bits_twice(B, T, head_dim, window, dtype):
    inputs = random_inputs(B, T, 2, 1, head_dim, True)
    cos, sin = rotary_tables(T, head_dim, device=DEVICE)

    def call(qkv, ve, gate):
        return rotary_attention(qkv, cos, sin, 2, window, ve, gate)

    runs = [outputs_and_gradients(call, inputs, dtype) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("window", [0, 20, 64])
def test_kernels_multiply_only_visited_tiles(window, monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    products = 0
    create_dot = InterpreterBuilder.create_dot

    def counted(self, *args):
        nonlocal products
        products += 1
        return create_dot(self, *args)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counted)
    T, H, KVH = 64, 2, 1
    qkv = random_inputs(1, T, H, KVH, 16, False)[0].float().requires_grad_()
    out = rotary_attention(qkv, *rotary_tables(T, 16), H, window)
    blocks = SMALL_TILES.forward
    assert products == 2 * H * len(visited_tiles(T, window, blocks.block_m, blocks.block_n))
    products = 0
    out.sum().backward()
    dq, dkv = SMALL_TILES.dq, SMALL_TILES.dkv
    expected = 3 * len(visited_tiles(T, window, dq.block_m, dq.block_n))
    expected += 4 * len(visited_tiles(T, window, dkv.block_m, dkv.block_n, by_query=False))
    assert products == H * expected


MUTANTS = [
    (prologue, "_prologue_kernel", "y2 = x2 * cos - x1 * sin", "y2 = x2 * cos + x1 * sin"),
    (prologue, "_prologue_kernel", "v + weight[:, None] * ve", "v + weight[:, None] * ve * 0.5"),
    (prologue, "_prologue_kernel", "head < NUM_HEADS", "head <= NUM_HEADS"),
    (prologue, "_prologue_kernel", "LN_2 * factor", "factor"),
    (prologue, "rotary_norm_bwd", "dy1 - y1 * along", "dy1"),
    (prologue, "rotary_norm_bwd", "du1 * sin + du2 * cos", "du2 * cos - du1 * sin"),
    (forward, "hide_keys", "offs_m - n0 - window", "offs_m - n0 - window + 1"),
    (forward, "hide_keys", "<= (offs_m - n0)", "<= (offs_m - n0 + 1)"),
    (forward, "_attention_fwd_kernel", "NARROW=NARROW", "NARROW=False"),
    (forward, "_attention_fwd_kernel", "head // GROUP", "head % (NUM_HEADS // GROUP)"),
    (forward, "key_runs", "m0 + BLOCK_M - 1 - window", "m0 - window"),
    (backward, "_dq_run", "(dp + neg_delta[:, None])", "dp"),
    (backward, "hide_keys", "offs_m - n0 - window", "offs_m - n0 - window - 1"),
    (backward, "_attention_dq_kernel", "NARROW=NARROW", "NARROW=False"),
    (backward, "_attention_dq_kernel", "SQUARE=LOG2_E * LOG2_E", "SQUARE=HEAD_DIM"),
    (backward, "_dkv_run", "tl.broadcast_to(neg_delta[None, :]", "tl.broadcast_to(0.0 * neg_delta[None, :]"),
    (backward, "_dkv_run", "(distance >= 0) &", ""),
    (backward, "_dkv_run", "distance <= window", "distance <= window - 1"),
    (forward, "_attention_fwd_kernel", "divisor[:, None], mask=live", "divisor[:, None], mask=(live & (offs_m < 39))"),
    (backward, "query_runs", "n0 + BLOCK_N + window", "n0 + window"),
    (backward, "_attention_dkv_kernel", "range(GROUP)", "range(1)"),
    (backward, "_attention_dkv_kernel", "2 * sigma * (1 - sigma)", "2 * sigma"),
    (backward, "_attention_dkv_kernel", "2 * sigma[:, None] * dv", "dv"),
]


@pytest.mark.parametrize(("module", "name", "old", "new"), MUTANTS)
def test_a_wrong_kernel_is_rejected(module, name, old, new, monkeypatch, tmp_path):
    wrong = mutated(getattr(module, name), old, new, tmp_path / "mutant.py")
    for user in (prologue, forward, backward):
        if hasattr(user, name):
            monkeypatch.setattr(user, name, wrong)
    with pytest.raises(AssertionError):
        check(random_inputs(1, 40, 4, 2, 16, True), 4, 18, 16, torch.float32)


WRONG_LOADS = [
    (SMALL_TILES, "head * HEAD_DIM)", "0)"),
    (SMALL_TILES, "batch.to(tl.int64) * batch_stride", "0"),
    (TMA_TILES, "head * HEAD_DIM]", "0]"),
    (TMA_TILES, "[batch.to(tl.int32), first,", "[0, first,"),
]


@pytest.mark.parametrize(("shapes", "old", "new"), WRONG_LOADS)
def test_a_wrong_load_is_rejected(shapes, old, new, monkeypatch, tmp_path):
    monkeypatch.setattr(tiles, "config", lambda head_dim, dtype, num_heads: shapes)
    wrong = mutated(rows.load_rows, old, new, tmp_path / "mutant.py")
    for user in (forward, backward):
        monkeypatch.setattr(user, "load_rows", wrong)
    with pytest.raises(AssertionError):
        check(random_inputs(2, 40, 4, 2, 16, True), 4, 18, 16, torch.float32)


def test_what_the_kernels_cannot_take_is_said():
    cos, sin = rotary_tables(8, 16, device=DEVICE)
    qkv, ve, gate = (x.float() for x in random_inputs(1, 8, 2, 1, 16, True))
    wrong = {
        "width": lambda: rotary_attention(qkv[..., :56].contiguous(), cos, sin, 2, 4),
        "heads": lambda: rotary_attention(qkv.new_zeros(1, 8, 112), cos, sin, 3, 4),
        "window": lambda: rotary_attention(qkv, cos, sin, 2, -1),
        "head_dim": lambda: rotary_attention(qkv.new_zeros(1, 8, 96), *rotary_tables(8, 24, device=DEVICE), 2, 4),
        "cos": lambda: rotary_attention(qkv, cos[:7], sin, 2, 4),
        "together": lambda: rotary_attention(qkv, cos, sin, 2, 4, ve),
        "ve": lambda: rotary_attention(qkv, cos, sin, 2, 4, ve.half(), gate),
        "contiguous": lambda: rotary_attention(qkv.transpose(1, 2).contiguous().transpose(1, 2), cos, sin, 2, 4),
    }
    for word, call in wrong.items():
        with pytest.raises(ValueError, match=word):
            call()


REAL = [
    (2, 2048, 4, 4, 128, 1024, True),
    (2, 2048, 4, 4, 128, 2048, False),
    (1, 1999, 8, 2, 64, 500, True),
    (1, 2048, 8, 8, 64, 2048, False),
    (3, 1, 4, 2, 128, 0, True),
    (2, 130, 4, 1, 128, 1, False),
]
SMALL = [
    (1, 150, 2, 1, 64, 70, True),
    (1, 131, 1, 1, 128, 131, False),
    (1, 140, 3, 1, 64, 50, True),  # no power of two: smaller tiles
    (2, 1, 2, 2, 64, 0, True),
]


@real_and_small("B, T, H, KVH, head_dim, window, has_ve", REAL, SMALL)
@pytest.mark.parametrize("arch", [80, 90, 120] if DEVICE == "cpu" else [None])
def test_bfloat16_in_its_own_tiles(B, T, H, KVH, head_dim, window, has_ve, arch, monkeypatch):
    monkeypatch.setattr(tiles, "config", real_config)
    if DEVICE == "cpu":
        monkeypatch.setattr(tiles, "gpu_arch", lambda: arch)
    check(random_inputs(B, T, H, KVH, head_dim, has_ve), H, window, head_dim, torch.bfloat16, draws=2)


@real_and_small("T, head_dim, window", [(700, 128, 300), (700, 64, 300)], [(40, 16, 18)])
def test_heavy_tails_in_bfloat16(T, head_dim, window):
    inputs = [x.pow(5) for x in random_inputs(1, T, 4, 4, head_dim, True)]
    check(inputs, 4, window, head_dim, torch.bfloat16)


@real_and_small("T, head_dim, window", [(512, 128, 300)], [(40, 64, 18)])
@pytest.mark.parametrize("sign", [1, -1])
def test_peaked_scores_in_bfloat16(sign, T, head_dim, window):
    """Every query along, or against, a key that recurs: the largest and the smallest scores there are."""
    inputs = random_inputs(1, T, 1, 1, head_dim, False)
    heads = inputs[0].view(1, T, 3, head_dim)
    heads[:, :, 1] = heads[:, :1, 1]
    heads[:, :, 0] = sign * heads[:, :, 1]
    check(inputs, 1, window, head_dim, torch.bfloat16, draws=2)


@real_and_small("T, head_dim, window", [(512, 128, 64)], [(48, 16, 16)])
def test_a_window_off_by_one_is_rejected_in_bfloat16(T, head_dim, window):
    def wrong(qkv, cos, sin, num_heads, window, ve, gate):
        return rotary_attention(qkv, cos, sin, num_heads, window - 1, ve, gate)

    check(random_inputs(1, T, 4, 4, head_dim, False), 4, window, head_dim, torch.bfloat16)
    with pytest.raises(AssertionError):
        check(random_inputs(1, T, 4, 4, head_dim, False), 4, window, head_dim, torch.bfloat16, op=wrong)


@real_and_small("B, T, H, head_dim", [(700, 2048, 4, 128)], [(3, 20, 2, 16)])
def test_offsets_past_two_to_the_31(B, T, H, head_dim):
    """The last sequence of a batch of more than 2³¹ elements equals the same sequence alone, bit for bit."""
    qkv = torch.randn(B, T, 3 * H * head_dim, device=DEVICE, dtype=torch.bfloat16)
    assert qkv.numel() > 2**31 or B == 3
    cos, sin = rotary_tables(T, head_dim, device=DEVICE)
    results = []
    for x in (qkv, qkv[-1:].clone()):
        x.requires_grad_()
        out = rotary_attention(x, cos, sin, H, T // 2)
        (dqkv,) = torch.autograd.grad(out, x, out.detach())
        results.append((out[-1].detach(), dqkv[-1]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
