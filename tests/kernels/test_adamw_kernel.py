"""AdamW's kernel against the reference in fp64."""

import importlib

import pytest
import torch

from tests.helpers.kernel_checks import DEVICE, assert_as_good, baselines, mutant, own_sizes, real_and_small

pytestmark = pytest.mark.usefixtures("kernels_everywhere")
op = importlib.import_module("kernels.adamw")
SHAPES = [(3, 347), (1,), (2, 1024), (5, 5, 5)]
BETAS, EPS = (0.8, 0.95), 1e-10


def make_group(shapes, copy_dtype, seed=0):
    """masters, grads, exp_avgs, exp_avg_sqs, copies: mid-training, gradients of very different size."""
    generator = torch.Generator(DEVICE).manual_seed(seed)  # there: tables of 67M elements take a CPU many seconds

    def tensors(scale=1.0):
        return [torch.randn(shape, generator=generator, device=DEVICE) * scale for shape in shapes]

    def sizes(shape):
        return 10.0 ** torch.randint(-8, 3, shape, generator=generator, device=DEVICE)

    grads = [g * sizes(g.shape) for g in tensors()]
    group = [tensors(), grads, tensors(0.1), [t.square() for t in tensors(0.1)]]
    return [*group, [None if copy_dtype is None else torch.zeros(s, dtype=copy_dtype, device=DEVICE) for s in shapes]]


def two_steps(update, group, dtype, apply=True, decay=5.0):
    """The group after two updates in `dtype`; copies keep theirs. The decay takes a tenth of a weight each time."""
    masters, grads, m, v = ([t.to(dtype, copy=True) for t in part] for part in group[:4])
    copies = [None if t is None else t.clone() for t in group[4]]
    for step in (7, 8):
        bias = [1 - beta**step for beta in BETAS]
        row = [99.0, 0.02, *bias, decay, 99.0]
        hyper = torch.tensor(row, device=DEVICE)[1:5]  # of a table, as the trainer has it
        gate = torch.tensor(apply, device=DEVICE)
        update(masters, grads, m, v, copies, hyper.to(dtype), gate, BETAS, EPS)
    return masters, m, v, copies


def check(module, shapes=SHAPES, copy_dtype=torch.bfloat16, draws=1):
    """All tensors and draws together, each with its own sizes: of a few elements the largest error is luck."""
    results = []
    for seed in range(draws):
        group = make_group(shapes, copy_dtype, seed)
        got = two_steps(module.adamw_update, group, torch.float32)
        baseline = baselines(lambda dtype, group=group: two_steps(op.adamw_update_ref, group, dtype))
        truth = two_steps(op.adamw_update_ref, group, torch.float64)
        results.append((got, truth, [[own_sizes(t) for t in part] for part in truth[:3]], *baseline))
        for master, copy in zip(got[0], got[3], strict=True):
            assert copy is None or torch.equal(copy, master.to(copy.dtype))
    for i, name in enumerate(("master", "m", "v")):
        value, truth, sizes, *baseline = (
            torch.cat([t.flatten() for kind in kinds for t in kind[i]]) for kinds in zip(*results, strict=True)
        )
        assert_as_good(name, value, baseline, truth, sizes=sizes)


@pytest.mark.parametrize("copy_dtype", [None, torch.bfloat16, torch.float16])
def test_two_steps(copy_dtype):
    check(op, copy_dtype=copy_dtype)


@pytest.mark.parametrize("decay", [0.0, 5.0])
def test_the_reference_is_torch_optim_adamw(decay):
    """In fp64, from nothing, at a rate that changes: PyTorch's decay is taken before the update, at the step's rate."""
    masters, grads, m, v, _ = make_group(SHAPES, None)
    masters, grads = ([t.double() for t in part] for part in (masters, grads))
    m, v = ([torch.zeros_like(t) for t in masters] for _ in (m, v))
    theirs = [torch.nn.Parameter(t.clone()) for t in masters]
    optimizer = torch.optim.AdamW(theirs, betas=BETAS, eps=EPS, weight_decay=decay)
    for step, lr in enumerate((0.02, 0.05, 0.01), 1):
        hyper = torch.tensor([lr, *(1 - beta**step for beta in BETAS), decay], dtype=torch.float64, device=DEVICE)
        op.adamw_update_ref(masters, grads, m, v, [None] * len(masters), hyper, torch.tensor(True), BETAS, EPS)
        optimizer.param_groups[0]["lr"] = lr
        for parameter, grad in zip(theirs, grads, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()
    for ours, other in zip(masters, theirs, strict=True):
        torch.testing.assert_close(ours, other.detach(), rtol=1e-12, atol=1e-12)


def test_decay_of_0_leaves_every_bit_of_the_kernel_as_without(tmp_path):
    """Against the kernel with the line that it had when there was no decay, on a GPU fused by its compiler."""
    update = "tl.div_rn(m_hat, tl.sqrt_rn(v_hat) + eps)"
    without = mutant(op, (f"tl.fma(-lr, {update}, kept)", f"master - lr * {update}"), folder=tmp_path)
    group = make_group(SHAPES, torch.bfloat16)
    ours, theirs = (two_steps(module.adamw_update, group, torch.float32, decay=0.0) for module in (op, without))
    for part, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(part, other, strict=True))


def test_decay_of_0_leaves_every_bit_of_the_reference_as_without():
    group = make_group(SHAPES, torch.bfloat16)
    masters, *_ = two_steps(op.adamw_update_ref, group, torch.float32, decay=0.0)
    for master, w, grad, m, v in zip(masters, *group[:4], strict=True):
        for step in (7, 8):
            lr, bias1, bias2 = torch.tensor([0.02, *(1 - beta**step for beta in BETAS)], device=DEVICE)
            m, v = m.lerp(grad, 1 - BETAS[0]), v.lerp(grad.square(), 1 - BETAS[1])
            w = w - lr * ((m / bias1) / ((v / bias2).sqrt() + EPS))
        assert torch.equal(master.view(torch.int32), w.view(torch.int32))


def test_sizes_of_whole_vectors():
    check(op, [(41, 48), (16,)])


def test_some_tensors_have_no_copy():
    group = make_group(SHAPES, torch.bfloat16)
    group[4][1] = None
    masters, *_, copies = two_steps(op.adamw_update, group, torch.float32)
    assert copies[1] is None
    assert all(torch.equal(c, m.bfloat16()) for m, c in zip(masters, copies, strict=True) if c is not None)


def test_nothing_changes_where_apply_is_false():
    group = make_group(SHAPES, torch.bfloat16)
    masters, m, v, copies = two_steps(op.adamw_update, group, torch.float32, apply=False)
    for before, after in zip((group[0], group[2], group[3], group[4]), (masters, m, v, copies), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_one_launch_and_one_table(monkeypatch):
    group = make_group(SHAPES, torch.bfloat16)
    hyper, apply = torch.tensor([0.1, 0.5, 0.5, 0.3], device=DEVICE), torch.tensor(True, device=DEVICE)
    before = op._address_table.cache_info()
    for _ in range(3):
        op.adamw_update(*group, hyper, apply, BETAS, EPS)
    after = op._address_table.cache_info()
    assert (after.misses - before.misses, after.hits - before.hits) == (1, 2)


MUTANTS = {
    "no bias correction of m": ("tl.div_rn(m, tl.load(hyper_ptr + 1))", "m"),
    "no bias correction of v": ("tl.div_rn(v, tl.load(hyper_ptr + 2))", "v"),
    "the gradient is not squared": ("grad * grad - v", "grad - v"),
    "one beta for both": ("v += lerp2", "v += lerp1"),
    "eps too large": ("tl.sqrt_rn(v_hat) + eps", "tl.sqrt_rn(v_hat) + 1e-4"),
    "the old m": ("m += lerp1 * (grad - m)\n", "old = m\n        m += lerp1 * (grad - m)\n        m, old = old, m\n"),
    "the copy is stale": ("master.to(COPY_DTYPE)", "grad.to(COPY_DTYPE)"),
    "no learning rate": ("tl.fma(-lr, ", "tl.fma(-1.0, "),
    "no decay": ("1 - lr * tl.load(hyper_ptr + 3)", "1 + 0 * lr"),
    "decay without the learning rate": ("1 - lr * tl.load(hyper_ptr + 3)", "1 - 0.1 * tl.load(hyper_ptr + 3)"),
    "decay grows a weight": ("1 - lr * tl.load(hyper_ptr + 3)", "1 + lr * tl.load(hyper_ptr + 3)"),
    "decay after the update": ("+ eps), kept)", "+ eps), master) * (1 - lr * tl.load(hyper_ptr + 3))"),
    "decay of the update too": ("kept = master *", "kept = (master - lr * m_hat) *"),
    "the last element is left out": ("mask = offs < size", "mask = offs < size - 1"),
    "always the first tensor": ("(tl.sum((first_blocks <= pid).to(tl.int32)) - 1) * 7", "0"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail(name, tmp_path):
    wrong = mutant(op, MUTANTS[name], folder=tmp_path)
    with pytest.raises(AssertionError):
        check(wrong)


def test_a_gate_that_is_ignored_is_seen(tmp_path):
    wrong = mutant(op, ("if tl.load(apply_ptr):", "if True:"), folder=tmp_path)
    group = make_group(SHAPES, torch.bfloat16)
    masters, *_ = two_steps(wrong.adamw_update, group, torch.float32, apply=False)
    assert not torch.equal(masters[0], group[0][0])


def test_errors_name_the_argument():
    group = make_group([(4, 6)], torch.bfloat16)
    rest = (torch.ones(4, device=DEVICE), torch.tensor(True, device=DEVICE), BETAS, EPS)
    for index, wrong, message in (
        (0, group[0][0].T, r"masters\[0\]: strided"),
        (1, group[1][0].half(), r"grads\[0\].*float16"),
        (2, group[2][0][:3], r"exp_avgs\[0\]"),
        (3, torch.zeros(25, device=DEVICE)[1:].view(4, 6), r"exp_avg_sqs\[0\]: its address"),
    ):
        broken = [list(part) for part in group]
        broken[index][0] = wrong
        with pytest.raises(ValueError, match=message):
            op.adamw_update(*broken, *rest)


REAL = [(8192, 512), (4, 8192, 512)], [(131_072, 512)], [(50_257, 768), (8,), (1,)]


@real_and_small("shapes", REAL, [[(37, 40), (2, 37, 40)], [(1,)]])
def test_tables_of_a_model(shapes):
    check(op, shapes, draws=32 if shapes == [(1,)] else 1)
    group = make_group(shapes, torch.bfloat16)
    runs = [two_steps(op.adamw_update, group, torch.float32) for _ in range(2)]
    for part, again in zip(*runs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(part, again, strict=True))


@pytest.mark.gpu
def test_past_two_to_the_31_bytes_and_elements():
    """2³¹ + 64 elements, of which the last ones are what they are alone: 36 GB."""
    size = 2**31 + 64
    masters, grads, m, v = ([torch.full((size,), value, device=DEVICE)] for value in (0.5, 0.25, 0.1, 0.2))
    hyper, apply = torch.tensor([0.1, 0.5, 0.5, 0.3], device=DEVICE), torch.tensor(True, device=DEVICE)
    alone = [[t[0][-64:].clone()] for t in (masters, grads, m, v)]
    op.adamw_update(masters, grads, m, v, [None], hyper, apply, BETAS, EPS)
    op.adamw_update(*alone, [None], hyper, apply, BETAS, EPS)
    assert all(torch.equal(a[0][-64:], b[0]) for a, b in zip((masters, m, v), (alone[0], *alone[2:]), strict=True))
    assert alone[0][0][0] != 0.5


@pytest.mark.gpu
def test_a_captured_step_replays():
    group = make_group([(8192, 512), (8,)], torch.bfloat16)
    expected = [[None if t is None else t.clone() for t in part] for part in group]
    hyper, apply = torch.tensor([0.1, 0.5, 0.5, 0.3], device=DEVICE), torch.tensor(False, device=DEVICE)
    op.adamw_update(*group, hyper, apply, BETAS, EPS)  # compiles, and changes nothing
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        op.adamw_update(*group, hyper, apply, BETAS, EPS)
    apply.fill_(True)
    for lr in (0.1, 0.05):
        hyper[0] = lr
        graph.replay()
        op.adamw_update(*expected, hyper, apply, BETAS, EPS)
    for part, other in zip(group, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(part, other, strict=True))
