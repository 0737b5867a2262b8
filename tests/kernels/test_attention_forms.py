"""The forms of attention's kernels that a tile selects: one loop or three, descriptors, log-sum-exp and delta ahead."""

import pytest
import torch

from kernels.rotary_attention import backward, forward, rotary_attention, rotary_tables, tiles
from kernels.rotary_attention.tiles import Config, Rows, Tiles
from tests.helpers.attention_checks import check, mutated, random_inputs
from tests.helpers.kernel_checks import DEVICE, outputs_and_gradients, real_and_small
from tests.helpers.visited_tiles import visited_tiles

BF16 = torch.bfloat16


def small(**form) -> Config:
    """Tiles small against T. `ahead` is the last kernel's alone."""
    passing = {**form, "ahead": False}
    shapes = Tiles(32, 16, 4, 2, **passing), Tiles(16, 32, 4, 2, **passing), Tiles(16, 32, 4, 2, **form)
    return Config(Rows(8, 4), *shapes)


FORMS = {
    "one loop": small(runs=1),
    "one loop, descriptors": small(runs=1, tma=True),
    "ahead": small(ahead=True),
    "all of it": small(runs=1, tma=True, ahead=True),
}
# Sequences of less than a tile and of some and a bit; windows of nothing, of less than a tile, and past the start.
SHAPES = [
    (2, 33, 2, 1, 32, 16, True),
    (1, 100, 1, 1, 16, 50, False),
    (1, 7, 4, 2, 16, 7, True),
    (1, 1, 2, 2, 32, 0, True),
    (1, 50, 3, 1, 16, 0, True),
    (1, 97, 2, 2, 16, 3, False),
    (1, 49, 2, 1, 32, 1000, True),
]
# Those that Hopper and Blackwell would have, and one of pointers for every GPU, where 99 KiB are shared.
ON_A_GPU = {
    "large": Config(
        Rows(16, 4), Tiles(128, 128, 8, 3, True, 1), Tiles(128, 64, 8, 3, True, 1), Tiles(64, 128, 8, 3, True, 1)
    ),
    "two a multiprocessor": Config(
        Rows(16, 4), Tiles(64, 64, 4, 3, True, 1), Tiles(64, 64, 4, 2, True, 1), Tiles(64, 64, 4, 2, True, 1, True)
    ),
    "ahead": Config(
        Rows(16, 4), Tiles(128, 64, 8, 4, True, 3), Tiles(64, 64, 4, 3, True, 3), Tiles(64, 128, 8, 2, True, 1, True)
    ),
    "pointers": Config(
        Rows(16, 4), Tiles(64, 32, 4, 3, False, 1), Tiles(64, 32, 4, 2, False, 1), Tiles(32, 64, 8, 2, False, 1, True)
    ),
}


@pytest.fixture(autouse=True)
def _kernels(kernels_everywhere):
    """All of them."""


@pytest.fixture
def use(monkeypatch):
    """Puts a Config in force."""
    return lambda shapes: monkeypatch.setattr(tiles, "config", lambda head_dim, dtype, num_heads: shapes)


@pytest.mark.parametrize(("B", "T", "H", "KVH", "head_dim", "window", "has_ve"), SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_output_and_gradients(form, B, T, H, KVH, head_dim, window, has_ve, use):
    use(FORMS[form])
    check(random_inputs(B, T, H, KVH, head_dim, has_ve), H, window, head_dim, torch.float32)


def test_a_running_maximum_in_one_loop(use):
    use(FORMS["one loop"])
    check(random_inputs(1, 33, 2, 1, 64, True), 2, 16, 64, torch.float16)


def test_tiles_wider_than_long_in_one_loop(use):
    use(Config(Rows(4, 4), *(Tiles(*size, 4, 1, runs=1) for size in ((16, 32), (32, 16), (32, 16)))))
    check(random_inputs(1, 100, 2, 1, 16, True), 2, 37, 16, torch.float32)


@pytest.mark.parametrize("window", [0, 5, 40, 1000])
@pytest.mark.parametrize("form", FORMS)
def test_a_form_changes_no_bit(form, window, use):
    """The same products and sums in the same order, of the same numbers."""
    inputs = random_inputs(2, 77, 2, 1, 16, True)
    tables = rotary_tables(77, 16, device=DEVICE)
    results = []
    for shapes in (small(), FORMS[form]):
        use(shapes)
        call = lambda qkv, ve, gate: rotary_attention(qkv, *tables, 2, window, ve, gate)  # noqa: E731
        results.append(outputs_and_gradients(call, inputs, torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("window", [0, 20, 64])
def test_one_loop_multiplies_only_visited_tiles(window, use, monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    products, create_dot = [], InterpreterBuilder.create_dot

    def counted(self, *args):
        products.append(1)
        return create_dot(self, *args)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counted)
    use(FORMS["one loop"])
    T, H = 64, 2
    qkv = random_inputs(1, T, H, 1, 16, False)[0].float().requires_grad_()
    rotary_attention(qkv, *rotary_tables(T, 16), H, window).sum().backward()
    _, *shapes = FORMS["one loop"]
    visited = [
        len(visited_tiles(T, window, shape.block_m, shape.block_n, by_query))
        for shape, by_query in zip(shapes, (True, True, False), strict=True)
    ]
    assert len(products) == H * sum(n * tiles for n, tiles in zip((2, 3, 4), visited, strict=True))


# What one loop or a descriptor could get wrong and three loops of pointers could not.
MUTANTS = [
    (forward, "hide_keys", "left = n0 < full", "left = n0 < full - 16"),
    (forward, "hide_keys", "late = n0 >= diagonal", "late = n0 > diagonal"),
    (forward, "hide_keys", "if NARROW:", "if False:"),
    (forward, "_fwd_run", "edges[RUN + 4 - RUNS]", "edges[2]"),
    (forward, "_fwd_run", "edges[RUN],", "edges[1],"),
    (forward, "_fwd_run", "n0, edges[1], edges[2]", "n0, edges[0], edges[2]"),
    (backward, "hide_keys", "left = n0 < full", "left = n0 < full - 32"),
    (backward, "hide_keys", "late = n0 >= diagonal", "late = n0 > diagonal"),
    (backward, "hide_keys", "if NARROW:", "if False:"),
    (backward, "_dq_run", "edges[RUN + 4 - RUNS]", "edges[2]"),
    (backward, "_dq_run", "edges[RUN],", "edges[1],"),
    (backward, "_dq_run", "n0, edges[1], edges[2]", "n0, edges[1], edges[3]"),
    (backward, "_dkv_run", "(m0 < edges[1]) |", ""),
    (backward, "_dkv_run", "| (m0 >= edges[2])", ""),
    (backward, "_dkv_run", "edges[RUN + 4 - RUNS]", "edges[2]"),
    (backward, "_dkv_run", "tl.range(edges[RUN]", "tl.range(edges[1]"),
    (backward, "_dkv_run", "neg_lse_ptr + m0", "neg_lse_ptr + edges[0]"),
    (backward, "_dkv_run", "do_source, batch, m0, head", "do_source, batch, m0, head // 2"),
    (backward, "_dkv_run", "q_source, batch, m0", "q_source, batch, edges[0]"),
    (backward, "_attention_dkv_kernel", "k_source, batch, n0, kv_head", "k_source, batch, n0, 0"),
    (backward, "_attention_dkv_kernel", "v_source, batch, n0", "v_source, batch, 0"),
]


@pytest.mark.parametrize(("module", "name", "old", "new"), MUTANTS)
def test_a_wrong_form_is_rejected(module, name, old, new, use, monkeypatch, tmp_path):
    use(FORMS["all of it"])
    monkeypatch.setattr(module, name, mutated(getattr(module, name), old, new, tmp_path / "mutant.py"))
    with pytest.raises(AssertionError):
        check(random_inputs(1, 90, 4, 2, 16, True), 4, 18, 16, torch.float32)


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_candidates_are_complete_and_have_every_form(arch, monkeypatch):
    monkeypatch.setattr(tiles, "gpu_arch", lambda: arch)
    shape = 128, BF16, 4, 2048, 1024
    for choice in (forward.FORWARD, backward.DQ, backward.DKV):
        found = choice.candidates(*shape)
        assert 12 < len(found) < 60
        assert all(set(tile) == {*Tiles._fields} for tile in found)
        assert {tile["runs"] for tile in found} == {1, 3}
        assert any(tile["tma"] for tile in found) == (arch >= 90)
        assert any(tile["ahead"] for tile in found) == (choice is backward.DKV)
        assert choice.candidates(128, torch.float32, 4, 2048, 1024) == [choice.default(128, torch.float32, 4)]
    if arch == 90:
        sizes = {tuple(tile.values())[:4] for tile in forward.FORWARD.candidates(*shape)}
        assert {(128, 128, 8, 3), (128, 64, 8, 4), (64, 64, 4, 2)} <= sizes


REAL = [(2, 2048, 4, 4, 128, 1024, True), (1, 1999, 6, 2, 64, 100, False)]


@real_and_small("B, T, H, KVH, head_dim, window, has_ve", REAL, [(1, 140, 2, 1, 16, 70, True)])
@pytest.mark.parametrize("form", ON_A_GPU)
def test_forms_in_bfloat16(form, B, T, H, KVH, head_dim, window, has_ve, use):
    shapes = ON_A_GPU[form]
    if DEVICE == "cuda" and shapes.forward.tma and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no tensor memory accelerator")
    use(shapes)
    inputs = random_inputs(B, T, H, KVH, head_dim, has_ve)
    check(inputs, H, window, head_dim, BF16)
    tables = rotary_tables(T, head_dim, device=DEVICE)

    def call(qkv, ve, gate):
        return rotary_attention(qkv, *tables, H, window, ve, gate)

    runs = [outputs_and_gradients(call, inputs, BF16) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
