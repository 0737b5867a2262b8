"""What every op owes to autograd, whatever it computes: one table of the ops, the same questions to each."""

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from tests.helpers.kernel_checks import DEVICE

pytestmark = pytest.mark.usefixtures("kernels_everywhere")


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def attention(qkv, ve, gate):
    return kernels.rotary_attention(qkv, *kernels.rotary_tables(9, 16, device=DEVICE), 2, 5, ve, gate)


def attention_with_a_key_offset(qkv, ve, gate):
    return kernels.rotary_attention(qkv, *kernels.rotary_tables(9, 16, device=DEVICE), 2, 9, ve, gate, key_offset=True)


def normed_products(x, weight, gate_weight):
    return [out.tensor for out in kernels.qkv_projection(kernels.Factors(x, draw(5).exp()), weight, gate_weight)]


def factors(*inputs):
    s, y, x0 = kernels.norm_factors(*inputs)
    return s, y.stream, x0


def in_place(x, weight, residual):
    return kernels.linear(x, weight, 1 * residual, overwrite=True)


def loss(x, weight):
    return kernels.linear_cross_entropy(x, weight, torch.arange(12, device=DEVICE))


def look_up(*tables):
    return tuple(kernels.embedding(torch.arange(12, device=DEVICE) % 7, tables))


def scalar(value):
    return torch.tensor(value, device=DEVICE)


# Name: the op, how to draw its inputs, and which of them are weights, whose gradient goes to main_grad.
OPS = {
    "rms_norm": (kernels.rms_norm, lambda: [draw(4, 24)], []),
    "rms_norm of a mix": (
        kernels.rms_norm, lambda: [draw(4, 24), draw(4, 24), scalar(1.25), scalar(-0.5)], [2, 3]
    ),
    "norm_factors": (factors, lambda: [draw(4, 24), draw(4, 24) + 1, scalar(1.25), scalar(-0.5)], [2, 3]),
    "linear": (kernels.linear, lambda: [draw(5, 24), draw(16, 24), draw(5, 16)], [1]),
    "linear over its residual": (in_place, lambda: [draw(5, 24), draw(16, 24), draw(5, 16)], [1]),
    "relu2_mlp": (kernels.relu2_mlp, lambda: [draw(5, 16), draw(32, 16), draw(16, 32), draw(5, 16)], [1, 2]),
    "relu2_mlp that forgets": (
        lambda *inputs: kernels.relu2_mlp(*inputs, recompute=True),
        lambda: [draw(5, 16), draw(32, 16), draw(16, 32), draw(5, 16)], [1, 2],
    ),
    "norm_relu2_mlp": (kernels.norm_relu2_mlp, lambda: [draw(5, 16), draw(32, 16), draw(16, 32)], [1, 2]),
    "qkv_projection": (kernels.qkv_projection, lambda: [draw(5, 24), draw(16, 24), draw(2, 8)], [1, 2]),
    "qkv_projection of a stream": (normed_products, lambda: [draw(5, 24), draw(16, 24), draw(2, 8)], [1, 2]),
    "rotary_attention": (attention, lambda: [draw(1, 9, 64), draw(1, 9, 16), draw(1, 9, 1)], []),
    "rotary_attention, key offset": (
        attention_with_a_key_offset, lambda: [draw(1, 9, 64), draw(1, 9, 16), draw(1, 9, 1)], []
    ),
    "embedding": (look_up, lambda: [draw(7, 8), draw(7, 4)], [0, 1]),
    "linear_cross_entropy": (loss, lambda: [draw(12, 8), draw(40, 8)], [1]),
}  # fmt: skip


@pytest.fixture(params=OPS)
def op(request):
    return OPS[request.param]


def call(function, inputs) -> list[torch.Tensor]:
    out = function(*inputs)
    return [out] if isinstance(out, torch.Tensor) else list(out)


def cotangents(outs):
    return [draw(*out.shape) + 0.5 for out in outs]


def test_a_second_backward_gives_the_same_bits(op):
    function, make, _ = op
    inputs = [x.requires_grad_() for x in make()]
    outs = call(function, inputs)
    runs = [torch.autograd.grad(outs, inputs, cotangents(outs), retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_inputs_are_left_as_they_were(op):
    function, make, _ = op
    inputs = [x.requires_grad_() for x in make()]
    outs = call(function, inputs)
    grads = cotangents(outs)
    kept = [t.detach().clone() for t in (*inputs, *outs, *grads)]
    torch.autograd.grad(outs, inputs, grads)
    assert all(torch.equal(a, b) for a, b in zip((*inputs, *outs, *grads), kept, strict=True))


def test_gradients_with_any_strides_come_in(op):
    function, make, _ = op
    inputs = [x.requires_grad_() for x in make()]
    outs = call(function, inputs)
    spread = [g.new_zeros(*g.shape, 3)[..., 1].copy_(g) for g in cotangents(outs)]
    for strange in (spread, [g.flatten()[0].expand(g.shape) for g in spread]):  # strides of 3, then of 0
        dense = [g.contiguous() for g in strange]
        runs = [torch.autograd.grad(outs, inputs, g, retain_graph=True) for g in (strange, dense)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_each_input_alone_has_the_gradient_that_it_has_among_all(op):
    function, make, weights = op
    inputs = [x.requires_grad_() for x in make()]
    outs = call(function, inputs)
    grads = cotangents(outs)
    together = torch.autograd.grad(outs, inputs, grads)
    for i, expected in enumerate(together):
        others = make()
        for j in weights:  # a frozen weight keeps what its main_grad holds
            others[j].main_grad = torch.full_like(others[j], 7.0)
        alone = [x.requires_grad_() if j == i else x for j, x in enumerate(others)]
        outs = call(function, alone)
        used = [k for k, out in enumerate(outs) if out.requires_grad]
        if hasattr(alone[i], "main_grad"):
            torch.autograd.backward([outs[k] for k in used], [grads[k] for k in used])
            assert alone[i].grad is None
            torch.testing.assert_close(alone[i].main_grad - 7.0, expected, rtol=1e-5, atol=1e-5)
        else:
            (got,) = torch.autograd.grad([outs[k] for k in used], [alone[i]], [grads[k] for k in used])
            assert torch.equal(got, expected)
        assert all((others[j].main_grad == 7.0).all() for j in weights if j != i)


def test_a_second_derivative_is_refused(op):
    function, make, _ = op
    inputs = [x.requires_grad_() for x in make()]
    outs = call(function, inputs)
    first = torch.autograd.grad(outs, inputs[0], cotangents(outs), create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        first.square().sum().backward()


def test_a_forward_without_a_backward_leaves_nothing_behind(op):
    function, make, _ = op
    inputs = [x.requires_grad_() for x in make()]
    outs = call(function, inputs)
    gone = [weakref.ref(node) for node in {out.grad_fn for out in outs}]
    del outs
    gc.collect()
    assert not any(ref() for ref in gone)


class _Allocations(TorchDispatchMode):
    """Elements of every tensor that an operator of PyTorch makes, views and in-place results excepted."""

    def __init__(self):
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not any(argument.alias_info for argument in func._schema.returns):
            outs = out if isinstance(out, tuple | list) else [out]
            self.sizes += [t.numel() for t in outs if isinstance(t, torch.Tensor)]
        return out


@pytest.mark.parametrize("V", [300, 3000])
def test_one_chunk_is_all_there_ever_is_of_the_logits(V, monkeypatch):
    module = kernels.linear_cross_entropy.__globals__
    monkeypatch.setitem(module, "_chunk_rows", lambda vocab_size, device: 16)
    x, weight, targets = draw(160, 3).requires_grad_(), draw(V, 3).requires_grad_(), torch.arange(160, device=DEVICE)
    with _Allocations() as made:
        kernels.linear_cross_entropy(x, weight, targets).backward()
    chunk = 16 * (-(-V // 64) * 64)
    assert [size for size in made.sizes if size > max(3 * V, 160 * 3)] == [chunk]
    with torch.no_grad(), _Allocations() as made:
        kernels.linear_cross_entropy(x, weight, targets, reduction="none")
    assert [size for size in made.sizes if size > max(3 * V, 160 * 3)] == [chunk]
