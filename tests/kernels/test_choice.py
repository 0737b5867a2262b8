"""Tiles in place of the kernels' own: what is chosen, for which shape, and what a kernel's digest depends on."""

import importlib

import pytest
import torch

import kernels
from kernels.choice import (
    Choice,
    _read,
    asked,
    choose,
    chosen,
    elements,
    fitting_block,
    fitting_blocks,
    grid,
    key_of,
    trying,
)
from tests.helpers.kernel_checks import DEVICE, mutant

pytest.importorskip("triton")
polar_express, mlp, adamw = (importlib.import_module(f"kernels.{name}") for name in ("polar_express", "mlp", "adamw"))


def halves() -> Choice:
    return Choice("halves", [], lambda n, dtype: {"BLOCK": n // 2}, lambda n, dtype: [{"BLOCK": n}, {"BLOCK": n // 2}])


def test_the_default_stands_where_nothing_was_chosen():
    choice, table = halves(), {"halves": {"8 float32": {"BLOCK": 1}}, "others": {"8 float32": {"BLOCK": 2}}}
    with chosen(table):
        assert choice(8, torch.float32) == {"BLOCK": 1}
        assert choice(8, torch.float16) == choice.default(8, torch.float16) == {"BLOCK": 4}
        assert choice(6, torch.float32) == {"BLOCK": 3}
        with chosen({}):
            assert choice(8, torch.float32) == {"BLOCK": 4}
        assert choice(8, torch.float32) == {"BLOCK": 1}
    assert choice(8, torch.float32) == {"BLOCK": 4}


def test_one_is_tried_and_the_others_stay():
    choice = halves()
    with chosen({"halves": {"8 float32": {"BLOCK": 1}, "6 float32": {"BLOCK": 2}}}):
        with trying("halves", "8 float32", {"BLOCK": 9}):
            assert [choice(n, torch.float32)["BLOCK"] for n in (8, 6)] == [9, 2]
        with trying("halves", "8 float32", None):
            assert [choice(n, torch.float32)["BLOCK"] for n in (8, 6)] == [4, 2]
        with pytest.raises(ZeroDivisionError), trying("halves", "8 float32", {"BLOCK": 9}):
            raise ZeroDivisionError
        assert choice(8, torch.float32) == {"BLOCK": 1}


def test_what_is_chosen_for_good_gives_back_what_was():
    assert choose({"halves": {"8 float32": {"BLOCK": 1}}}) == {}
    assert halves()(8, torch.float32) == {"BLOCK": 1}
    choose({})
    assert halves()(8, torch.float32) == {"BLOCK": 4}


def test_candidates_begin_with_the_default_and_are_there_once():
    assert halves().candidates(8, torch.float32) == [{"BLOCK": 4}, {"BLOCK": 8}]
    assert grid(elements(lambda tile: tile["N"], 2, 4), N=(32, 64, 128, 256), num_warps=(1,)) == [
        {"N": 64, "num_warps": 1}, {"N": 128, "num_warps": 1},
    ]  # fmt: skip
    assert key_of((3, torch.bfloat16, True)) == "3 bfloat16 True"


def test_no_more_than_a_quarter_of_a_block_lies_past_a_row():
    assert fitting_blocks(640, (128, 256, 512)) == [128, 256]  # 640 and 768 lanes, and 1,024
    assert fitting_blocks(512, (128, 256, 512)) == [128, 256, 512]
    assert fitting_blocks(768, (128, 512, 1024)) == [128, 512, 1024]  # a quarter is no more than that
    assert fitting_blocks(65, (128, 256)) == [128]  # none fits
    for width, block in ((640, 256), (512, 512), (1024, 512), (2560, 512), (768, 512), (300, 128), (40, 64), (1, 1)):
        assert fitting_block(width, 512) == block
    assert (fitting_block(640, 1024), fitting_block(768, 1024), fitting_block(512, 1024)) == (256, 1024, 512)


def test_what_is_looked_up_is_noted():
    choice = halves()
    with asked() as outer, asked() as inner:
        choice(8, torch.float32)
    choice(6, torch.float32)
    assert outer == inner == {("halves", "8 float32"): (choice, (8, torch.float32))}


def test_no_choice_depends_on_how_many_there_are():
    """So that a process which holds a share of the matrices, or fewer rows, computes the same bits of them."""

    def lookups(batch: int, rows: int) -> set:
        g = torch.empty(batch, 64, 32, device="meta")
        x, weights = torch.empty(rows, 64, device="meta", dtype=torch.bfloat16), (256, 64)
        w_fc = torch.empty(weights, device="meta", dtype=torch.bfloat16).requires_grad_()
        targets = torch.empty(rows, device="meta", dtype=torch.int64)
        from train.tune.targets import recorded_launches

        with kernels.ops_in_force("triton"), asked() as calls, recorded_launches(run=False):
            kernels.polar_express(g)
            kernels.rms_norm(x)
            x.requires_grad_()
            outs = (
                kernels.relu2_mlp(x, w_fc, w_fc.mT.contiguous(), x), kernels.linear(x, w_fc),
                kernels.qkv_projection(x, w_fc)[0], kernels.linear_cross_entropy(x, w_fc, targets),
            )  # fmt: skip
            torch.autograd.backward(outs, [torch.empty_like(out) for out in outs])
        return {(key, str(choice(*shape))) for key, (choice, shape) in calls.items()}

    assert lookups(1, 7) == lookups(24, 4096)
    assert len(lookups(1, 7)) >= 12
    assert sum(name == "product" for (name, _), _ in lookups(1, 7)) == 3


@pytest.mark.parametrize(("old", "new", "changes"), [
    ("acc += beta * tl.load(a_ptr", "acc -= beta * tl.load(a_ptr", True),  # the kernel
    ("block = 128 if M > 512", "block = 128 if M > 256", True),  # what may be chosen, the default among it
    ("acc += alpha * tl.load(x_ptr", "acc -= alpha * tl.load(x_ptr", False),  # another kernel of the file
    ("COEFFICIENTS = (", "\n\nCOEFFICIENTS = (", False),  # all of it two lines further down
])  # fmt: skip
def test_a_digest_changes_with_its_kernel_and_no_other(old, new, changes, tmp_path):
    digests = []
    for edits in ((), ((old, new),)):
        module = mutant(polar_express, *edits, folder=tmp_path)
        digests.append(module.SYMMETRIC.digest(512, 2048, torch.bfloat16))
    assert (digests[0] != digests[1]) == changes


def test_a_digest_knows_what_the_kernel_calls():
    read: dict[str, str] = {}
    _read(mlp._fc_fwd_kernel, read)
    assert {"kernels.mlp._fc_fwd_kernel", "kernels.gemm.gemm_tile", "kernels.gemm.tile_index"} <= read.keys()
    assert not any("proj" in name for name in read)


def test_every_choice_of_a_shape_is_complete():
    """A candidate stands in the default's place: it has all that the launch takes from it."""
    for choice, shape in (
        (polar_express.SYMMETRIC, (512, 2048, torch.bfloat16)), (polar_express.LAST, (512, 512, torch.bfloat16)),
        (mlp.FC_FORWARD[False], (2048, 512, torch.bfloat16)), (adamw.ADAMW, ()),
    ):  # fmt: skip
        default, *others = choice.candidates(*shape)
        assert others
        for tile in others:
            if "way" not in tile | default and "persistent" not in tile:
                assert tile.keys() == default.keys(), choice.name
    assert DEVICE == "cuda" or polar_express.SYMMETRIC.candidates(4, 32, torch.bfloat16) == [
        polar_express.SYMMETRIC.default(4, 32, torch.bfloat16)
    ]
