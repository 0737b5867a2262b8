"""A whole training step, and op by op the time of its parts: `pytest bench/test_step.py --benchmark-only`.

The step is the trainer's own: micro-steps, then the update, on random tokens. Its time is the host's, from one
synchronisation to the next: gaps between kernels count. The ops are timed one by one at the shapes that they have in
the step, as in test_ops.py. All of it is in the JSON that `--benchmark-json FILE` writes, and `python -m bench.roofline
--measured FILE` prints the gap of each op. The same step with other options of `train` follows, as a whole alone. A GPU
with too little memory for the default rows takes fewer, as training does there, and says so.
"""

import dataclasses

import pytest
import torch

import kernels
from bench.ceilings import device_name
from bench.conftest import DEVICE
from bench.suite.providers import CPU, EAGER, TRITON, assert_right
from bench.suite.replay import device_time, replay
from model import GPTConfig
from train import recipes
from train.config import TrainConfig, resolve
from train.memory import fit_default
from train.results.metrics import utilisation
from train.step import TrainStep
from train.tune.ops import micro_step_ops
from train.tune.problems import build, directions, runner
from train.tune.steps import make_step
from train.tune.timing import time_call, time_synchronised

PROVIDER = TRITON if DEVICE == "cuda" else CPU
CONFIG = resolve(TrainConfig(ops=PROVIDER.ops), DEVICE)
DTYPE = CONFIG.forward_dtype
VOCAB_SIZES = (8192, 32768) if DEVICE == "cuda" else (recipes.vocab_size("cpu"),)
# A CPU's forms hardly forget and never fuse, and it has no graphs: there it is the same step twice.
OPTIONS = {
    "--recompute": {"recompute": True},
    "--fused-norms": {"fused_norms": True},
    "--recompute --fused-norms": {"recompute": True, "fused_norms": True},
    "--no-graphs": {"graphs": False},
} if DEVICE == "cuda" else {"--recompute": {"recompute": True}}  # fmt: skip


def assert_step_is_right(step: TrainStep, tokens: torch.Tensor) -> None:
    """The losses of two rows, by the provider's ops and by the references."""
    inputs, targets = tokens[:2, :-1], tokens[:2, 1:]
    losses = step.token_losses(inputs, targets)
    kernels.set_ops(EAGER.ops)
    reference = step.token_losses(inputs, targets)
    kernels.set_ops(PROVIDER.ops)
    error = ((losses - reference).norm() / reference.norm()).item()
    assert error < 2e-2, f"losses err by {error:.1e} of their norm: no time for a wrong step"


def time_step(config: TrainConfig, shape: GPTConfig) -> dict:
    """The step, the update alone, and what they need."""
    before = 0  # what earlier tests left: buffers of the clock's, a workspace of cuBLAS for each stream
    if DEVICE == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()  # before the capture: a replay allocates nothing that would be seen
    step, batches, values = make_step(config, shape, DTYPE)
    assert_step_is_right(step, batches[0].tokens)
    loss, good = step(batches, values)
    assert good.item(), f"the step's loss is {loss.item()}"
    timing = time_synchronised(lambda: step(batches, values), DEVICE)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if DEVICE == "cuda" else None
    update = time_synchronised((step.graphs or step).update, DEVICE)
    pace = config.total_batch_size / timing.median
    used = utilisation(shape, torch.device(DEVICE), pace)
    return {
        "timing": timing,
        "step_ms": 1e3 * timing.median,
        "update_ms": 1e3 * update.median,
        "tokens_per_second": pace,
        "mfu_percent": used.mfu,
        "mfu_causal_percent": used.mfu_causal,
        "peak_mib": peak,
    }


def time_ops(config: TrainConfig, shape: GPTConfig) -> list[dict]:
    """Each op of a micro-step alone: {op, count, forward_ms, both_ms}."""
    measured = []
    for op in micro_step_ops(config, shape):
        line = {"op": op.name, "count": op.count}
        for direction in directions(op):
            assert_right(PROVIDER, op, direction, DEVICE, DTYPE)
            with PROVIDER.active():
                call = runner(PROVIDER.function(op, DEVICE), build(op, DEVICE, DTYPE), direction)
                line[f"{direction}_ms"] = 1e3 * time_call(call, DEVICE).median
        measured.append(line)
    return measured


@pytest.mark.benchmark(timer=device_time)
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_step(benchmark, ceilings, commit, steps, vocab_size):
    shape = CONFIG.model_config(vocab_size)
    config = fit_default(CONFIG, shape)
    with PROVIDER.active():
        whole = time_step(config, shape)
    replay(benchmark, whole.pop("timing"))
    steps[f"V = {vocab_size:,}"] = whole
    benchmark.extra_info |= {
        "device": device_name(DEVICE),
        "commit": commit,
        "step": {
            **whole,
            "ops": PROVIDER.ops,
            "config": dataclasses.asdict(config),
            "model": dataclasses.asdict(shape),
            "ceilings": dataclasses.asdict(ceilings),
            "parts": time_ops(config, shape),
        },
    }


@pytest.mark.benchmark(timer=device_time)
@pytest.mark.parametrize("flags", OPTIONS)
def test_options(benchmark, commit, steps, flags):
    shape = CONFIG.model_config(VOCAB_SIZES[0])
    config = dataclasses.replace(fit_default(CONFIG, shape), **OPTIONS[flags])
    with PROVIDER.active():
        whole = time_step(config, shape)
    replay(benchmark, whole.pop("timing"))
    steps[f"V = {VOCAB_SIZES[0]:,} {flags}"] = whole
    benchmark.extra_info |= {"device": device_name(DEVICE), "commit": commit, "flags": flags, "options": whole}
