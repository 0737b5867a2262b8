"""Every op by every provider: `pytest bench/test_ops.py --benchmark-only [--providers triton,liger]`.

What each computes is compared with the reference in fp64 before its time is taken; a wrong result has no time. On a GPU
the ops are those of the default configuration, at V = 8,192 and 32,768, and some at other sizes, in bf16; on a CPU
those of its own defaults, in fp32. Those of `--fused-norms` are the kernels' alone. Where a provider runs out of memory
it gets half the rows, again and again: its row says so, and what is compared is the time of a token. A case is named
after the public function: `-k rms_norm` takes its cases alone.
"""

import dataclasses

import pytest
import torch

from bench.ceilings import device_name
from bench.conftest import DEVICE
from bench.suite.providers import COMPILE, Provider, assert_right, providers
from bench.suite.replay import device_time, replay
from bench.suite.results import row
from kernels import key_of, trying
from kernels.weight_grad import WEIGHT_GRAD, weight_grad
from model import GPT
from train import recipes
from train.config import TrainConfig, resolve
from train.optimizer import Optimizer
from train.schedule import step_values
from train.tune.ops import Op, micro_step_ops, update_ops
from train.tune.problems import build, directions, is_update, kind, runner
from train.tune.timing import time_call

CONFIG = resolve(TrainConfig(), DEVICE)
VOCAB_SIZES = (8192, 32768) if DEVICE == "cuda" else (recipes.vocab_size("cpu"),)
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
HEAD_ROWS = 32768  # of a chunk of the head, about
HAS_VE, WITHOUT = (("has_ve", True),), (("has_ve", False),)
KEY_OFFSET = (*HAS_VE, ("key_offset", True))
# head_dim 64, fewer key-value heads, sizes that are no multiple of any tile.
OTHER_SIZES = {
    "cuda": (
        Op("rms_norm", 1, "rms_norm", (65536, 768)),
        Op("rms_norm, odd", 1, "rms_norm", (12345, 500)),
        Op("rotary_attention, head_dim 64", 1, "rotary_attention", (128, 2048, 8, 8, 64, 1024), HAS_VE),
        Op("rotary_attention, grouped", 1, "rotary_attention", (64, 2048, 8, 2, 128, 2048), WITHOUT),
        Op("rotary_attention, odd", 1, "rotary_attention", (65, 1999, 4, 4, 128, 777), HAS_VE),
        Op("rotary_attention, key offset", 1, "rotary_attention", (128, 2048, 4, 4, 128, 2048), KEY_OFFSET),
        Op("relu2_mlp, wider", 1, "mlp", (131072, 768, 3072)),
        Op("linear_cross_entropy, wider", 1, "linear_cross_entropy", (65536, 768, 50257)),
    ),
    "cpu": (Op("rotary_attention, grouped", 1, "rotary_attention", (3, 100, 4, 2, 32, 37), WITHOUT),),
}


def default_ops() -> list[Op]:
    """The ops of the default configuration and of `--fused-norms`, each size once."""
    found = {}
    for config in (CONFIG, dataclasses.replace(CONFIG, fused_norms=True)):
        for vocab_size in VOCAB_SIZES:
            shape = config.model_config(vocab_size)
            for op in [*micro_step_ops(config, shape), *update_ops(shape)]:
                found.setdefault((op.module, op.sizes, op.flags, op.shape), op)
    return list(found.values())


def cases() -> list:
    """(op, direction, provider). The default configuration comes first, what has to compile for long comes last: where
    time is short (`--bench-seconds`), that is what is left out."""
    found, ops = providers(DEVICE), [*default_ops(), *OTHER_SIZES[DEVICE]]
    runnable = [
        (op, direction, provider)
        for op in ops
        for direction in directions(op)
        for provider in found
        if provider.missing is None and kind(op) in provider.functions
    ]
    runnable.sort(key=lambda case: case[2].name == COMPILE.name)
    params = [pytest.param(*case, id=_id(*case)) for case in runnable]
    # What nobody here can run is found by its name all the same, and says why not.
    for op in ops:
        absent = [provider for provider in found if kind(op) in provider.functions]
        if all(provider.missing for provider in absent):
            params += [
                pytest.param(op, direction, provider, id=_id(op, direction, provider), marks=_skip(provider))
                for direction in directions(op)
                for provider in absent
            ]
    for provider in found:
        if provider.missing:
            params.append(pytest.param(None, None, provider, id=f"none-{provider.name}", marks=_skip(provider)))
    return params


def _id(op: Op, direction: str, provider: Provider) -> str:
    return f"{op.name}-{direction}-{provider.name}".replace(" ", "_")


def _skip(provider: Provider) -> pytest.MarkDecorator:
    return pytest.mark.skip(reason=f"{provider.name}: {provider.missing}")


def timed(provider, op: Op, direction: str):
    """The timing, and the op as it was run: with fewer rows where memory asked for that."""
    while True:
        try:
            problem = build(op, DEVICE, DTYPE)
            return time_call(runner(provider.function(op, DEVICE), problem, direction), DEVICE), op
        except torch.OutOfMemoryError:
            if is_update(op) or op.sizes[0] == 1:
                raise
            problem = None
            torch.cuda.empty_cache()
            half = (op.sizes[0] + 1) // 2
            op = dataclasses.replace(op, sizes=(half, *op.sizes[1:]))


@pytest.mark.benchmark(timer=device_time)
@pytest.mark.parametrize(("op", "direction", "provider"), cases())
def test_op(request, benchmark, ceilings, commit, rows, op, direction, provider):
    wanted = request.config.getoption("--providers")
    if wanted and provider.name not in wanted.split(","):
        pytest.skip(f"{provider.name} is not among --providers {wanted}")
    assert_right(provider, op, direction, DEVICE, DTYPE)
    with provider.active():
        timing, ran = timed(provider, op, direction)
    figures = row(
        op, ran, direction, provider.name, timing, DTYPE.itemsize, ceilings, device_name(DEVICE), commit
    )
    replay(benchmark, timing)
    benchmark.extra_info |= figures
    rows.append(figures)


@pytest.mark.benchmark(timer=device_time)
def test_optimizer_step(benchmark):
    """All groups at once, gate and finite check included."""
    torch.manual_seed(0)
    model = GPT(CONFIG.model_config(VOCAB_SIZES[0]), device=DEVICE)
    model.init_weights(0)
    optimizer = Optimizer(model, CONFIG, DTYPE)
    optimizer.grads.normal_()
    optimizer.set_hyper(step_values(CONFIG, 0, 0.0))
    loss = torch.ones((), device=DEVICE)
    assert optimizer.update(loss).item()
    replay(benchmark, time_call(lambda: optimizer.update(loss), DEVICE))


def weights() -> list[tuple[int, int, int]]:
    """(rows, N, K) of each gradient of a weight [N, K] in a micro-step of the default configuration, each size once."""
    found = []
    for op in micro_step_ops(CONFIG, CONFIG.model_config(VOCAB_SIZES[0])):
        rows, width, *others = op.sizes
        if op.module == "linear":
            found.append((rows, others[0], width))
        elif op.module == "qkv_projection":
            found += [(rows, others[0], width), *([(rows, *others[1:])] if others[1:] else [])]
        elif op.module == "mlp":
            found += [(rows, others[0], width), (rows, width, others[0])]
        elif op.module == "linear_cross_entropy":
            found.append((min(rows, HEAD_ROWS), others[0], width))
    return list(dict.fromkeys(found))


@pytest.mark.benchmark(timer=device_time)
@pytest.mark.parametrize("way", ["vendor", "own"])
@pytest.mark.parametrize(("rows", "N", "K"), weights())
def test_weight_gradient(benchmark, rows, N, K, way):
    """By itself, added to an fp32 buffer: the vendor's product, and the first of the kernels' own ways, about one wave
    of the GPU. Which of them is the fastest `train.tune` finds."""
    if way == "own" and DEVICE != "cuda":
        pytest.skip("the kernels need a CUDA device")
    dy, x = (torch.randn(rows, width, device=DEVICE).to(DTYPE) for width in (N, K))
    vendor, *own = WEIGHT_GRAD.candidates(N, K, DTYPE)
    tile, main_grad = vendor if way == "vendor" else own[0], torch.zeros(N, K, device=DEVICE)
    with trying(WEIGHT_GRAD.name, key_of((N, K, DTYPE)), tile):
        few, truth = slice(min(rows, 2048)), dy[:2048].double().mT @ x[:2048].double()
        weight_grad(dy[few], x[few], main_grad)
        assert (main_grad - truth).norm() < 1e-3 * truth.norm(), "no time for a wrong result"
        timing = time_call(lambda: weight_grad(dy, x, main_grad), DEVICE)
    replay(benchmark, timing)
    benchmark.extra_info |= {"tile": tile, "TFLOP/s": 2e-12 * rows * N * K / timing.median}
