"""Bytes of a step at the default GPU configuration, counted on meta tensors with the kernels' launches left out, and
`--recompute`, which may change memory and nothing else."""

import re
import subprocess
import sys

import pytest
import torch

import kernels
from bench.live_bytes import LiveBytes
from model import GPT, GPTConfig
from prepare import InputError
from tests.kernel_checks import DEVICE
from tests.test_kernels_together import random_batches, random_step
from train.config import TrainConfig, resolve
from train.memory import MARGIN, OVERHEAD, activation_bytes, check_batch_fits
from train.optimizer import Optimizer
from train.precompile import walk_step

MIB = 2**20
SMALL = GPTConfig(vocab_size=90, seq_len=5, depth=3, d_model=32, head_dim=16, num_kv_heads=1, window_pattern="S")


@pytest.fixture(autouse=True)
def _restore_ops():
    yield
    kernels.set_ops(None)


@pytest.fixture
def launches_left_out(monkeypatch):
    from triton.runtime import interpreter, jit

    monkeypatch.setattr(jit.JITFunction, "run", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda self, *args, **kwargs: None)


def test_live_bytes_follow_tensors_and_not_views():
    with LiveBytes() as memory:
        a = torch.empty(1000, device="meta")
        view = a.view(10, 100)
        b = a + a
        assert memory.now == 8000
        del a
        assert memory.now == 8000  # the view holds it
        b.add_(1)
        del view
        assert (memory.now, memory.peak) == (4000, 8000)
        (b + b).sum()
        assert (memory.now, memory.peak) == (4000, 8004)
    torch.empty(5000, device="meta")
    assert memory.peak == 8004


@pytest.mark.parametrize("fused_norms", [False, True])
@pytest.mark.parametrize(("recompute", "aim"), [(False, 26_000), (True, 16_000)])
def test_the_default_step_fits(launches_left_out, recompute, aim, fused_norms):
    """The published system takes 45,060 MB at this batch."""
    config = resolve(TrainConfig(recompute=recompute, fused_norms=fused_norms), "cuda")
    with LiveBytes() as memory:
        walk_step(config, 8192)
    assert memory.peak < aim * MIB
    # What no way of counting can avoid: the state, and in each layer qkv, attention's output, the input of the MLP.
    assert memory.peak > 769 * MIB + 8 * 262_144 * 5 * 512 * 2


def test_the_state_is_what_the_optimizer_needs():
    config = resolve(TrainConfig(), "cuda")
    with LiveBytes() as memory:
        model = GPT(config.model_config(8192), device="meta")
        optimizer = Optimizer(model, config, torch.bfloat16)
        parameters = 50.33e6  # fp32 masters, gradients and first moment, bf16 copies; AdamW's half has a second moment
        assert memory.now == pytest.approx(14 * parameters + 4 * parameters / 2, rel=0.01)
    assert optimizer.groups


def gradients(recompute: bool, autocast: bool) -> dict[str, torch.Tensor]:
    step = random_step(SMALL, torch.float32)
    step.autocast, step.model.recompute = autocast, recompute
    for tokens in random_batches(SMALL, rows=1, count=2):
        with step.precision():
            loss = step.model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
    return {name: p.main_grad for name, p in step.model.named_parameters()}


@pytest.mark.parametrize(("ops", "autocast"), [("triton", False), ("reference", False), ("reference", True)])
def test_recompute_changes_no_bit(ops, autocast):
    """Over two micro-steps: a gradient that the second run of a product added once more would show."""
    kernels.set_ops(ops)
    again = gradients(True, autocast)
    for name, kept in gradients(False, autocast).items():
        assert kept.abs().max() > 0, f"{name}: a gradient of zero tests nothing"
        assert torch.equal(kept, again[name]), name


def test_recompute_keeps_less_on_the_references():
    step = random_step(SMALL, torch.float32)
    kept = activation_bytes(step.model, 8, step.precision())
    step.model.recompute = True
    hidden = 8 * SMALL.seq_len * 4 * SMALL.d_model * 4
    # relu(z) and its square, of all layers but the last; z itself is not kept
    assert kept - activation_bytes(step.model, 8, step.precision()) == (SMALL.depth - 1) * 2 * hidden


@pytest.mark.parametrize("ops", ["triton", "reference"])
def test_counting_leaves_nothing_behind(ops, launches_left_out):
    """Neither memory nor a node: one that lives on remembers the stream it was made on, and no capture on another
    stream may wait for that."""
    kernels.set_ops(ops)
    step = random_step(SMALL, torch.float32)
    with LiveBytes() as memory:
        activation_bytes(step.model, 2, step.precision())
        first = memory.now  # what is made once, like the rotary table
        activation_bytes(step.model, 2, step.precision())
        assert memory.now == first < memory.peak


def test_the_largest_batch_that_fits_is_named(launches_left_out):
    """Exactly, although the gradient of lm_head is kept once whatever the rows."""
    kernels.set_ops("triton")
    config = resolve(TrainConfig(device_batch_size=8, seq_len=SMALL.seq_len, total_batch_size=8 * SMALL.seq_len), "cpu")
    step = random_step(GPTConfig(**{**vars(SMALL), "vocab_size": 9000}), torch.float32)
    kept = {rows: activation_bytes(step.model, rows, step.precision()) for rows in (1, 4, 8)}
    assert kept[8] < 4 * kept[1]
    needed = {rows: OVERHEAD[DEVICE] + MARGIN[DEVICE] * bytes_kept for rows, bytes_kept in kept.items()}
    check_batch_fits(config, step.model, step.precision(), needed[8] + 1)
    for available, named in ((needed[8] - 1, "size 4"), (needed[4] - 1, "size 2"), (needed[1] - 1, "lower --seq-len")):
        with pytest.raises(InputError, match=named):
            check_batch_fits(config, step.model, step.precision(), available)


MEASURE = """
import sys
from pathlib import Path
import train.__main__
from train import memory, trainer

def resident(which):
    line, = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) * 1024

def check(config, model, precision, available):
    per_row, fixed = memory.bytes_of_rows(model, precision)
    trainer.check_batch_fits = lambda *_: None
    print("estimate", per_row * config.device_batch_size + fixed)
    print("before", resident("VmRSS"))

trainer.check_batch_fits = check
assert train.__main__.main(sys.argv[1:]) == 0
print("most", resident("VmHWM"))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what a process held at most is read in /proc")
def test_a_run_on_a_cpu_takes_no_more_than_estimated(corpus, tmp_path):
    """All of it, from the first step to the curves. A process of its own: a heap in which nothing has been freed. Holes
    come with the steps, and `--recompute` makes the most of them beside what is kept."""
    arguments = ["--data", str(corpus), "--run-dir", str(tmp_path / "run"), "--device", "cpu", "--no-autocast"]
    arguments += ["--steps", "30", "--untimed-steps", "1", "--device-batch-size", "16", "--total-batch-size", "4096"]
    arguments += ["--recompute"]
    run = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True)
    found = {name: float(re.search(rf"^{name} (\S+)$", run.stdout, re.M)[1]) for name in ("estimate", "before", "most")}
    grown = found["most"] - found["before"]
    kept = (found["estimate"] - OVERHEAD["cpu"]) / MARGIN["cpu"]  # little more where the allocator leaves no holes
    assert kept < grown < found["estimate"], found


def test_what_is_made_again_is_made_once():
    kernels.set_ops("triton")
    x = torch.randn(6, 5, device=DEVICE, requires_grad=True)
    calls = []

    def double():
        calls.append(1)
        return 2 * x

    y = double()
    with kernels.recomputed(y, double):
        z = (y * y).sum() + (y[:, :2] ** 3).sum()
    truth = x.detach().clone().requires_grad_()
    ((2 * truth).square().sum() + ((2 * truth[:, :2]) ** 3).sum()).backward()
    with torch.no_grad():
        y.zero_()  # not what is kept
    z.backward()
    assert len(calls) == 2
    torch.testing.assert_close(x.grad, truth.grad)


def test_an_overwritten_qkv_is_refused_by_whoever_kept_it():
    kernels.set_ops("triton")
    cos, sin = kernels.rotary_tables(4, 16, device=DEVICE)
    x = torch.randn(1, 4, 48, device=DEVICE, requires_grad=True)
    qkv = x.exp()  # keeps its result
    out = kernels.rotary_attention(qkv, cos, sin, 1, 4, overwrite=True)
    with pytest.raises(RuntimeError, match="inplace"):
        out.sum().backward()
    qkv = x.exp()
    before = qkv.detach().clone()
    again = kernels.rotary_attention(qkv, cos, sin, 1, 4)
    assert torch.equal(out, again)
    assert torch.equal(qkv, before)


def test_hooks_outside_see_what_is_kept_and_not_what_is_forgotten():
    kernels.set_ops("triton")
    x = torch.randn(6, 5, device=DEVICE, requires_grad=True)
    y, other, seen = 2 * x, x.detach() + 1, []

    def pack(tensor):
        seen.append(tensor.data_ptr())
        return [tensor]

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed[0])
    with hooks, kernels.recomputed(y, lambda: 2 * x):
        z = (y * y * other.requires_grad_()).sum()
    assert other.data_ptr() in seen
    assert y.data_ptr() not in seen
    z.backward()
    torch.testing.assert_close(x.grad, 8 * x.detach() * other.detach())
