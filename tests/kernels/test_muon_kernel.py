"""Muon's kernels against the reference in fp64."""

import importlib

import pytest
import torch

from tests.helpers.kernel_checks import DEVICE, assert_as_good, baselines, mutant, real_and_small, transposed

pytestmark = pytest.mark.usefixtures("kernels_everywhere")
op = importlib.import_module("kernels.muon")
# Of one matrix with one singular value the error is one draw, and luck: there are many of those.
SHAPES = [(2, 4, 32), (2, 45, 45), (2, 70, 29), (3, 29, 70), (24, 7, 1)]


def make_group(shape, copy_dtype=torch.bfloat16, strided=False):
    """master, grad, momentum, second_moment, copy: mid-training; strided ones are the middle rows of larger tensors."""
    generator = torch.Generator().manual_seed(0)
    batch, rows, cols = shape
    padded = (batch, rows + 5, cols) if strided else shape

    def tensor(scale, size=padded):
        return (torch.randn(size, generator=generator) * scale).to(DEVICE)

    group = [tensor(0.05), tensor(1e-3), tensor(1e-3)]
    copy = None if copy_dtype is None else torch.zeros(padded, dtype=copy_dtype, device=DEVICE)
    if strided:
        group = [t[:, 2:-3] for t in group]
        copy = None if copy is None else copy[:, 2:-3]
    second_moment = tensor(0.1, op.second_moment_shape(shape)).square() / max(rows, cols)
    return [*group, second_moment, copy]


LR, DECAY = 0.04, 0.2
STEPS = ((0.86, 0.0), (0.95, 0.0))  # momentum and decay


def updated(update, group, dtype, iterate_dtype, apply=True, steps=STEPS):
    """master, momentum, second_moment, copy after two updates; views stay views of memory laid out alike."""

    def clone(t, dtype):
        if t is None:
            return None
        base = torch.zeros(t.shape[0], t.stride(0), dtype=dtype, device=t.device)
        return base.as_strided(t.shape, t.stride()).copy_(t)

    master, grad, momentum, second_moment = (clone(t, dtype) for t in group[:4])
    copy = clone(group[4], group[4].dtype if group[4] is not None else None)
    for mu, weight_decay in steps:
        # A row of a table, as the trainer has it.
        hyper = torch.tensor([99.0, LR, mu, weight_decay, 99.0], device=DEVICE)[1:4].to(dtype)
        gate = torch.tensor(apply, device=DEVICE)
        update(master, grad, momentum, second_moment, copy, hyper, gate, iterate_dtype)
        grad = grad.flip(0) * 2
    return master, momentum, second_moment, copy


def check(module, shape, iterate_dtype=torch.float32, strided=False, copy_dtype=torch.bfloat16):
    group = make_group(shape, copy_dtype, strided)
    got = updated(module._launch, group, torch.float32, iterate_dtype)

    def reference(dtype):
        return updated(op.muon_update_ref, group, torch.promote_types(dtype, torch.float32), dtype)[:3]

    baseline, truth = transposed(baselines(reference, iterate_dtype)), reference(torch.float64)
    for name, *values in zip(("master", "momentum", "second moment"), got, baseline, truth, strict=False):
        assert_as_good(f"{name} {shape}", *values)
    assert got[3] is None or torch.equal(got[3], got[0].to(got[3].dtype))
    check_decay(module, group, iterate_dtype)


def check_decay(module, group, iterate_dtype):
    """By the module's own update without decay, whose direction has the same bits: a sign that was a matter of rounding
    in one is so in the other."""
    before, plain, decayed = (
        updated(module._launch, group, torch.float32, iterate_dtype, steps=steps)[0].double()
        for steps in ((), STEPS[:1], [(STEPS[0][0], DECAY)])
    )
    expected = plain - LR * DECAY * before * ((before - plain) * before > 0)
    clear = before != plain  # an update below the master's last digit has a sign too, which does not show
    assert clear.float().mean() > 0.99
    assert (decayed - expected)[clear].abs().max() <= 4 * 2**-24 * before.abs().max()  # four roundings


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_two_steps(shape, strided):
    check(op, shape, strided=strided)


@pytest.mark.parametrize("shape", [(2, 45, 30), (2, 30, 45)])
def test_bfloat16_iterates_and_no_copy(shape):
    check(op, shape, torch.bfloat16, copy_dtype=None)


def test_the_public_op_is_the_kernels():
    group = make_group((2, 20, 33))
    expected = updated(op._launch, group, torch.float32, torch.bfloat16)
    got = updated(lambda *args: op.muon_update(*args[:-1]), group, torch.float32, None)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_nothing_changes_where_apply_is_false():
    group = make_group((2, 20, 33), strided=True)
    group[1][0, 0, 0] = float("nan")
    got = updated(op._launch, group, torch.float32, torch.float32, apply=False)
    assert all(torch.equal(a, b) for a, b in zip(got, (group[0], *group[2:]), strict=True))


MUTANTS = {
    "momentum without Nesterov": ("momentum + (1 - mu) * (grad - momentum), mask", "momentum, mask"),
    "the old second moment": ("second_moment += lerp", "second_moment += 0 * lerp"),
    "no norm is kept": ("g = g * scale * tl.load(ratio_ptr + batch)", "g = g * scale"),
    "no scale": ("g = g * scale * tl.load", "g = g * tl.load"),
    "the ratio of the first matrix": ("tl.load(ratio_ptr + batch)", "tl.load(ratio_ptr)"),
    "decay everywhere": ("tl.where(g * master >= 0", "tl.where(g * master >= -1e9"),
    "no learning rate in the decay": ("decay = lr * tl.load", "decay = tl.load"),
    "means over the padded size": ("v = tl.sum(acc, axis=1) / N", "v = tl.sum(acc, axis=1) / BLOCK_N"),
    "rows for columns": ("strides = (cols, 1) if by_row", "strides = (1, rows) if by_row"),
    "no learning rate": ("master = master - lr * g - tl", "master = master - g - tl"),
    "the last column is left out": ("(offs_c < C)\n        lr =", "(offs_c < C - 1)\n        lr ="),
    "the master as if it were dense": ("master_ptr + batch * master_stride_b", "master_ptr + batch * R * C"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail(name, tmp_path):
    wrong = mutant(op, MUTANTS[name], folder=tmp_path)
    with pytest.raises(AssertionError):
        check(wrong, (3, 70, 29), strided=True)


def test_errors_name_the_argument():
    group = make_group((2, 6, 8))
    rest = (torch.ones(3, device=DEVICE), torch.tensor(True, device=DEVICE))
    for index, wrong in ((1, group[1].half()), (2, group[2][:, :3]), (3, group[3][..., :4]), (4, group[4].mT)):
        name = ("master", "grad", "momentum", "second_moment", "copy")[index]
        with pytest.raises(ValueError, match=name):
            op.muon_update(*(wrong if i == index else t for i, t in enumerate(group)), *rest)
    with pytest.raises(ValueError, match="hyper"):
        op.muon_update(*group, rest[0].half(), rest[1])


REAL = [(24, 512, 512), (8, 2048, 512), (8, 512, 2048), (4, 4, 32), (8, 128, 512), (2, 1000, 777)]


@real_and_small("shape", REAL, [(2, 45, 30)])
def test_matrices_of_a_model(shape):
    check(op, shape, torch.bfloat16)
    check(op, shape, torch.bfloat16, strided=True)
    group = make_group(shape)
    runs = [updated(op._launch, group, torch.float32, torch.bfloat16) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_gradient_of_zero_changes_only_the_moments():
    master, grad, momentum, second_moment, copy = make_group((2, 20, 33))
    grad.zero_()
    momentum.zero_()
    before = master.clone()
    hyper = torch.tensor([0.04, 0.9, 0.0], device=DEVICE)
    op.muon_update(master, grad, momentum, second_moment, copy, hyper, torch.tensor(True, device=DEVICE))
    assert torch.equal(master, before)
    assert torch.equal(copy, master.bfloat16())


def test_cost_is_that_of_the_docstring():
    assert op.cost(100) == (100 * 30, 100 * 18)
    assert op.cost(100, copy_itemsize=0) == (100 * 28, 100 * 18)
