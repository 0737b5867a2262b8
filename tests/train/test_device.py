"""Which device a run takes: machines whose GPU is missing, hidden, too old, another maker's, or one of two."""

import os
import re
from types import SimpleNamespace

import pytest
import torch

import train.__main__
from model import GPTConfig
from prepare import InputError
from tests import conftest
from tests.helpers.tiny_run import TINY
from train import device, evaluate, sample
from train.config import TrainConfig, resolve
from train.step import TrainStep


@pytest.fixture
def machine(monkeypatch):
    """Makes this machine another: what PyTorch was built for, and what it says of the GPU there."""

    def make(*, available=False, cuda=None, hip=None, mps=False, init=None, nodes=(), capability=(9, 0)):
        def start():
            if init:
                raise RuntimeError(init)

        for owner, name, value in (
            (torch.cuda, "is_available", lambda: available), (torch.cuda, "init", start),
            (torch.cuda, "get_device_capability", lambda: capability), (torch.version, "cuda", cuda),
            (torch.version, "hip", hip), (torch.backends.mps, "is_available", lambda: mps),
        ):  # fmt: skip
            monkeypatch.setattr(owner, name, value)
        monkeypatch.setattr(device, "device_nodes", lambda: list(nodes))

    return make


TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by downloading\n"
    "and installing a new version"
)
UNUSABLE = {
    "a driver too old": ({"cuda": "13.0", "init": TOO_OLD}, "system is too old .found version 11040.*update"),
    "a driver that fails": ({"cuda": "13.0", "init": "Unexpected error from cudaGetDeviceCount()"}, "Unexpected error"),
    "a PyTorch without CUDA": ({"nodes": ["nvidia0"]}, "built without CUDA: install the torch"),
    "AMD's": ({"available": True, "hip": "6.4"}, "written for NVIDIA's GPUs, .*ROCm"),
    "too old itself": ({"available": True, "cuda": "13.0", "capability": (7, 5)}, "capability 7.5, bf16 needs 8"),
}


@pytest.mark.parametrize(("options", "said"), UNUSABLE.values(), ids=UNUSABLE)
def test_a_gpu_that_cannot_be_used_is_no_silent_run_on_the_cpu(machine, options, said):
    """What the CPU would train is another model on another corpus."""
    machine(**options)
    for wanted in (None, "cuda"):
        with pytest.raises(InputError, match=said) as error:
            device.pick_device(wanted)
        assert "--device cpu" in str(error.value)
        assert "\n" not in str(error.value)
    assert device.pick_device("cpu") == "cpu"


@pytest.mark.parametrize("options", [
    {}, {"cuda": "13.0", "init": "Found no NVIDIA driver on your system. Please check"},
    {"cuda": "13.0", "init": "No CUDA GPUs are available"},
], ids=["no CUDA, no GPU", "no driver", "all of them hidden"])  # fmt: skip
def test_without_a_gpu_the_cpu_trains(machine, options, capsys):
    machine(**options)
    assert device.pick_device(None) == "cpu"
    assert capsys.readouterr().out == ""
    with pytest.raises(InputError, match="sees no CUDA device"):
        device.pick_device("cuda")


@pytest.mark.parametrize(("given", "wanted", "available", "found"), [
    (None, None, True, ":4096:8"), (None, "cuda", True, ":4096:8"), (":16:8", None, True, ":16:8"),
    ("", None, True, ""), (None, "cpu", True, None), (None, None, False, None),
])  # fmt: skip
def test_on_a_gpu_the_workspace_of_the_products_is_asked_for(machine, monkeypatch, given, wanted, available, found):
    """Of 32 MiB, unless the user asks for another."""
    machine(available=available)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", given or "")  # what stands there is put back after the test
    if given is None:
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    device.pick_device(wanted)
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == found
    if found == device.WORKSPACE:  # as PyTorch reads it
        assert sum(int(size) * int(count) for size, count in re.findall(":([0-9]+):([0-9]+)", found)) == 32 * 1024


def test_apples_gpu_is_passed_over_in_one_line(machine, capsys):
    machine(mps=True)
    assert device.pick_device(None) == "cpu"
    assert capsys.readouterr().out.count("\n") == 1


def test_one_line_from_the_command_line(machine, small_data, tmp_path, capsys):
    machine(cuda="13.0", init=TOO_OLD)
    given = [*TINY[2:], "--data", str(small_data), "--run-dir", str(tmp_path / "run"), "--steps", "1"]
    assert train.__main__.main(given) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: there is a GPU that PyTorch cannot use: The NVIDIA driver")
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("count", "said"), [(1, "H100"), (2, "H100 (number 1 of 2, counted from 0; CUDA_VISIBLE_DEV")])
def test_of_several_gpus_the_one_in_use_is_named(monkeypatch, count, said):
    for name, value in (("get_device_name", "H100"), ("current_device", 1), ("device_count", count)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert device.gpu_name().startswith(said)


def test_a_run_is_scored_with_its_own_ops(monkeypatch):
    """On its own device; on another by the default there, unless the kernels do not take its shape."""
    monkeypatch.setattr(device, "check_compiler", lambda device: None)
    monkeypatch.setattr(device, "check_launching", lambda: None)
    usual, wide = (GPTConfig(vocab_size=64, seq_len=8, depth=1, d_model=256, head_dim=n) for n in (64, 256))
    for of, ops, shape, on, expected in (
        ("cuda", "reference", usual, "cuda", "reference"), ("cuda", "reference", wide, "cuda", "reference"),
        ("cuda", "triton", usual, "cuda", "triton"), ("cuda", "compile", wide, "cuda", "compile"),
        ("cpu", "reference", usual, "cuda", "triton"), ("cpu", "reference", wide, "cuda", "reference"),
        ("cuda", "triton", usual, "cpu", "cpu"), ("cpu", "compile", usual, "cpu", "compile"),
        ("cpu", "reference", usual, "cpu", "reference"), ("cuda", "triton", wide, "cpu", "cpu"),
    ):  # fmt: skip
        config = resolve(TrainConfig(ops=ops, d_model=256, head_dim=shape.head_dim), of)
        found = device.on_device(config, shape, on)
        assert (found.ops, found.device) == (expected, on)
    compiled = resolve(TrainConfig(ops="compile"), "cpu")
    assert device.on_device(compiled, usual, "cpu", compiles=False).ops == "reference"


@pytest.mark.parametrize("command", [evaluate.main, lambda args: sample.main([*args, "--tokens", "2"])],
                         ids=["evaluate", "sample"])  # fmt: skip
def test_a_finished_run_of_a_cpu_asks_for_no_kernel(small_run, monkeypatch, command):
    """Looking at it takes the ops that its configuration has."""
    asked = []
    pick = device.pick_ops
    monkeypatch.setattr(device, "pick_ops", lambda wanted, on: asked.append(wanted) or pick(wanted, on))
    assert command([str(small_run), "--device", "cpu"]) == 0
    assert asked == ["cpu"]


def test_what_is_fp32_is_fp32_whatever_the_environment_asks_for(small_run, monkeypatch):
    """TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 begins a process as this does; on a CPU "medium" is bf16."""
    seen, losses = [], TrainStep.token_losses

    def score(self, *args):
        seen.append(torch.get_float32_matmul_precision())
        return losses(self, *args)

    monkeypatch.setattr(TrainStep, "token_losses", score)
    torch.set_float32_matmul_precision("medium")
    try:
        assert evaluate.main([str(small_run), "--device", "cpu", "--audit"]) == 0
    finally:
        torch.set_float32_matmul_precision("highest")
    assert {*seen} == {"highest"}


@pytest.mark.parametrize(("total", "marked", "left_out"), [(24, True, True), (80, True, False), (24, False, False)])
def test_a_test_that_is_too_large_for_a_small_gpu_is_left_out_there_alone(monkeypatch, total, marked, left_out):
    monkeypatch.setattr(conftest, "takes_the_gpu", lambda config: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=total * 2**30))
    running = conftest.pytest_runtest_call(SimpleNamespace(config=None, get_closest_marker=lambda name: marked))
    next(running)
    with pytest.raises(pytest.skip.Exception if left_out else torch.OutOfMemoryError):
        running.throw(torch.OutOfMemoryError("CUDA out of memory"))
