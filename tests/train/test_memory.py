"""Bytes of a step at the default GPU configuration, counted on meta tensors with the kernels' launches left out, and
`--recompute`, which may change memory and nothing else."""

import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import kernels
import train.memory
from model import GPT, GPTConfig
from prepare import InputError
from tests.helpers.kernel_checks import DEVICE
from tests.helpers.whole_model import random_batches, random_step
from train.config import TrainConfig, resolve
from train.live_bytes import LiveBytes
from train.memory import check_fits, count, fit_default
from train.optimizer import Optimizer
from train.precompile import walk_step

MIB = 2**20
SMALL = GPTConfig(vocab_size=90, seq_len=5, depth=3, d_model=32, head_dim=16, num_kv_heads=1, window_pattern="S")


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
        # fp32 masters, gradients, their sums over two micro-steps, the first moment; bf16 copies; AdamW's half has a
        # second moment.
        parameters = 50.33e6
        assert memory.now == pytest.approx(18 * parameters + 4 * parameters / 2, rel=0.01)
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


def tiny(**options) -> TrainConfig:
    return resolve(TrainConfig(**{"ops": "reference", "depth": 2, "d_model": 64, "head_dim": 16, "seq_len": 64,
                                  "device_batch_size": 4, "total_batch_size": 1024} | options), "cpu")  # fmt: skip


def held_by_a_real_step(config: TrainConfig, shape: GPTConfig) -> int:
    """Beside its state, on this CPU, in fp32."""
    kernels.set_ops("reference")
    model = GPT(shape, **config.model_options)
    model.init_weights(0)
    with LiveBytes() as memory:
        optimizer = Optimizer(model, config)
        memory.peak = state = memory.now
        tokens = torch.zeros(config.device_batch_size, config.seq_len, dtype=torch.int32)
        loss = model(tokens, tokens)
        loss.backward()
        assert optimizer.update(loss.detach())
        return memory.peak - state


@pytest.mark.parametrize("options", [
    {}, {"num_kv_heads": 1}, {"recompute": True}, {"device_batch_size": 1, "seq_len": 1024},
    {"device_batch_size": 16, "d_model": 32},
], ids=["plain", "one kv head", "recompute", "a long row", "many rows"])  # fmt: skip
def test_what_is_counted_without_memory_is_what_a_step_holds(options):
    """To the byte: the attention that a CPU takes, the chunks of its loss, the [T, T] mask."""
    config = tiny(**options)
    shape = config.model_config(700)
    assert count(config, shape, config.device_batch_size).step == held_by_a_real_step(config, shape)


def test_recompute_needs_less_on_the_references():
    kept, again = (count(c, c.model_config(90), 4).step for c in (tiny(), tiny(recompute=True)))
    hidden = 4 * 64 * 4 * 64 * 4
    assert kept - again == 2 * hidden  # relu(z) and its square, of all layers but the last; z itself is not kept


@pytest.mark.parametrize("ops", ["triton", "reference"])
def test_counting_leaves_nothing_behind(ops):
    """The ops are as they were, and a kernel is launched again."""
    kernels.set_ops("compile")
    config = tiny(ops=ops)
    first = count(config, config.model_config(90), 2)
    assert kernels.compiles()
    assert count(config, config.model_config(90), 2) == first
    kernels.set_ops("triton")
    assert kernels.rms_norm(torch.ones(3, 8, device=DEVICE))[1].sum().item() == pytest.approx(24, rel=1e-5)


def test_a_row_beyond_all_memory_is_noticed_before_it_is_made(monkeypatch):
    monkeypatch.setattr(train.memory, "available_bytes", lambda device: 2**34)
    config = tiny(seq_len=10_000_000, device_batch_size=1, total_batch_size=10_000_000)
    with pytest.raises(InputError, match=r"^1 row of 10000000 tokens needs more than 64.0 GiB .*: lower --seq-len"):
        check_fits(config, config.model_config(90))
    config = tiny(seq_len=30_000, device_batch_size=1, total_batch_size=30_000)
    assert count(config, config.model_config(90), 1).step > 8 * 30_000**2  # the distances that the mask is made from


def test_the_largest_batch_that_fits_is_named(monkeypatch):
    """Exactly, although much is held once whatever the rows."""
    config = tiny(ops="triton", device_batch_size=8, total_batch_size=16 * 64)
    shape = config.model_config(9000)
    needed = {rows: count(config, shape, rows).on("cpu") for rows in (1, 4, 8)}
    assert needed[8] < 4 * needed[1]
    for available, named in (
        (needed[8], None), (needed[8] - 1, "size 4$"), (needed[4] - 1, "size 2$"), (needed[1] - 1, "lower --seq-len"),
    ):  # fmt: skip
        monkeypatch.setattr(train.memory, "available_bytes", lambda device, available=available: available)
        if named is None:
            check_fits(config, shape)
            continue
        with pytest.raises(InputError, match=named):
            check_fits(config, shape)


class Card:
    """A GPU of `total` GiB, `free` of them free."""

    def __init__(self, monkeypatch, total: float, free: float | None = None):
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=total * 2**30))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: ((free or total) * 2**30, total * 2**30))


@pytest.mark.parametrize(("total", "rows"), [(139, 128), (80, 128), (31.8, 64), (23.5, 64), (15.7, 32), (8, 16)])
def test_a_default_takes_what_the_card_holds(monkeypatch, capsys, total, rows):
    """Whatever is free of it. The step's tokens stay, and one line says so."""
    config = resolve(TrainConfig(ops="triton"), "cuda")
    for free in (total, 1):
        Card(monkeypatch, total, free)
        fitted = fit_default(config, config.model_config(8192))
        assert fitted == replace(config, device_batch_size=rows)
        said = capsys.readouterr().out
        assert said.count("\n") == (rows < 128)
        assert (f"--device-batch-size {rows}, at the same total" in said) == (rows < 128)
    assert fitted.total_batch_size == 524_288


def test_a_gpu_that_another_process_holds_is_said(monkeypatch):
    config = resolve(TrainConfig(ops="triton", device_batch_size=64), "cuda")
    shape = config.model_config(8192)
    Card(monkeypatch, 24)
    check_fits(config, shape)
    Card(monkeypatch, 24, free=10)
    said = "10.0 GiB of this GPU's 24.0 GiB are free, since another process holds the rest (nvidia-smi names it)"
    with pytest.raises(InputError, match=re.escape(f"{said}: end it, or use --device-batch-size 32")):
        check_fits(config, shape)
    Card(monkeypatch, 16)
    with pytest.raises(InputError, match=r"16.0 GiB of this GPU's 16.0 GiB are free: use --device-batch-size 64$"):
        check_fits(replace(config, device_batch_size=128), shape)


MEASURE = """
import sys
from pathlib import Path
import train.__main__
from train import memory, trainer

def resident(which):
    line, = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) * 1024

def check(config, shape, ranks):
    need = memory.count(config, shape, config.device_batch_size)
    print("estimate", need.on("cpu"))
    print("held", need.step)
    print("before", resident("VmRSS"))

trainer.check_fits = check
assert train.__main__.main(sys.argv[1:]) == 0
print("most", resident("VmHWM"))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what a process held at most is read in /proc")
def test_a_run_on_a_cpu_takes_no_more_than_estimated(corpus, tmp_path):
    """All of it, from the first step to the curves. A process of its own: a heap in which nothing has been freed. Holes
    come with the steps, and `--recompute` makes the most of them beside what is kept."""
    arguments = ["--data", str(corpus), "--run-dir", str(tmp_path / "run"), "--device", "cpu", "--no-autocast"]
    arguments += ["--steps", "30", "--untimed-steps", "1", "--device-batch-size", "16", "--total-batch-size", "4096"]
    arguments += ["--seq-len", "256", "--recompute"]
    run = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True)
    names = ("estimate", "held", "before", "most")
    found = {name: float(re.search(rf"^{name} (\S+)$", run.stdout, re.M)[1]) for name in names}
    grown = found["most"] - found["before"]
    assert found["held"] < grown < found["estimate"], found  # little above the first where the heap has no holes


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
