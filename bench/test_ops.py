"""Every op, forward and with its backward: `pytest bench/test_ops.py --benchmark-only`.

Providers: the PyTorch reference anywhere, the Triton kernels on a GPU. Before a time is taken, the provider's outputs
are compared with the reference in fp64. On a CPU the shapes are the CPU defaults', in fp32.
"""

import pytest
import torch

import kernels
from kernels.rotary_attention import rotary_tables
from model import GPT
from train.config import TrainConfig, resolve
from train.optimizer import Optimizer
from train.schedule import step_values

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = resolve(TrainConfig(), DEVICE)
SHAPE = CONFIG.model_config(8192 if DEVICE == "cuda" else 1024)
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
TOLERANCE = 2e-2 if DEVICE == "cuda" else 1e-4  # of ‖out‖: bf16 operands, fp32 operands
B, T, D, V = CONFIG.device_batch_size, CONFIG.seq_len, SHAPE.d_model, SHAPE.vocab_size


def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPE) * scale


def rms_norm(rows):
    lambdas = [torch.tensor(x, device=DEVICE) for x in (0.9, 0.2)]
    return (lambda x, x0, r, o: kernels.rms_norm(x, x0=x0, lambda_r=r, lambda_0=o)), [
        randn(rows, T, D),
        randn(rows, T, D),
        *lambdas,
    ]


def rotary_attention(rows):
    cos, sin = rotary_tables(T, SHAPE.head_dim, device=DEVICE)
    inputs = [randn(rows, T, D + 2 * SHAPE.kv_width), randn(rows, T, SHAPE.kv_width), randn(rows, T, SHAPE.kv_heads)]
    return (lambda qkv, ve, gate: kernels.rotary_attention(qkv, cos, sin, SHAPE.num_heads, T // 2, ve, gate)), inputs


def relu2_mlp(rows):
    weights = [randn(4 * D, D, scale=D**-0.5), randn(D, 4 * D, scale=D**-0.5)]
    return kernels.relu2_mlp, [randn(rows, T, D), *weights, randn(rows, T, D)]


def linear_cross_entropy(rows):
    targets = torch.randint(V, (rows * T,), device=DEVICE)
    return (lambda x, w: kernels.linear_cross_entropy(x, w, targets)), [randn(rows * T, D), randn(V, D, scale=D**-0.5)]


def embedding(rows):
    tokens = torch.randint(V, (rows, T), device=DEVICE)
    return (lambda *tables: kernels.embedding(tokens, tables)), [randn(V, D), randn(V, SHAPE.kv_width)]


OPS = [rms_norm, rotary_attention, relu2_mlp, linear_cross_entropy, embedding]
PROVIDERS = [
    "reference",
    pytest.param("triton", marks=pytest.mark.skipif(DEVICE == "cpu", reason="the kernels need a CUDA device")),
]


@pytest.fixture
def provider(request):
    kernels.set_ops(request.param)
    yield request.param
    kernels.set_ops(None)


def outputs(op, inputs) -> list[torch.Tensor]:
    out = op(*inputs)
    return [out] if isinstance(out, torch.Tensor) else list(out)


def assert_right(make) -> None:
    """One row, against the reference in fp64."""
    torch.manual_seed(0)
    op, inputs = make(1)
    got = outputs(op, inputs)
    kernels.set_ops("reference")
    for value, truth in zip(got, outputs(op, [x.double() for x in inputs]), strict=True):
        error = (value.double() - truth).norm() / truth.norm()
        assert error < TOLERANCE, f"{make.__name__}: error {error:.1e}, no time is reported for a wrong result"


def synchronised(function):
    def run():
        function()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return run


@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("make", OPS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("provider", PROVIDERS, indirect=True)
def test_op(benchmark, provider, make, direction):
    assert_right(make)
    kernels.set_ops(provider)
    rows = B if provider == "triton" or DEVICE == "cpu" else B // 8
    op, inputs = make(rows)
    if direction == "both":
        inputs = [x.requires_grad_() for x in inputs]
        cotangents = [torch.randn_like(o) for o in outputs(op, inputs)]

        def call():
            torch.autograd.grad(outputs(op, inputs), inputs, cotangents)
    else:

        def call():
            with torch.no_grad():
                op(*inputs)

    benchmark.pedantic(synchronised(call), rounds=10, warmup_rounds=2)
    benchmark.extra_info["Mtok/s"] = round(rows * T / benchmark.stats.stats.median / 1e6, 3)


def test_optimizer_step(benchmark):
    torch.manual_seed(0)
    model = GPT(SHAPE, device=DEVICE)
    model.init_weights(0)
    optimizer = Optimizer(model, CONFIG, DTYPE)
    optimizer.grads.normal_()
    optimizer.set_hyper(step_values(CONFIG, 0, 0.0))
    loss = torch.ones((), device=DEVICE)
    assert optimizer.update(loss).item()
    benchmark.pedantic(synchronised(lambda: optimizer.update(loss)), rounds=10, warmup_rounds=2)
