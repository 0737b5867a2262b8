"""A checkpoint's folder: nothing that happens while one is written harms those before it, and what is read is whole."""

import builtins
import errno
import hashlib
import json
import os
import random
import shutil
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train.resilience.checkpoint
import train.resilience.durable
from model import GPT
from prepare import Dataset, InputError, Loader
from train.budget import Budget
from train.config import TrainConfig, resolve
from train.optimizer import Optimizer
from train.resilience.checkpoint import (
    Checkpointer,
    DamagedError,
    checkpoint_folders,
    newest_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from train.resilience.state import RunState
from train.resilience.tensors import header, load_tensors, save_tensors
from train.schedule import StepValues
from train.step import TrainStep

CONFIG = resolve(
    TrainConfig(depth=2, d_model=64, head_dim=16, num_kv_heads=2, seq_len=32, device_batch_size=4,
                total_batch_size=256), "cpu",
)  # fmt: skip
ORIGIN = {"config": CONFIG.fixed(), "data": {}}


def make_state(corpus, seed: int, forward_dtype=torch.float32) -> tuple[TrainStep, RunState]:
    data = Dataset.open(corpus)
    model = GPT(CONFIG.model_config(512))
    model.init_weights(seed)
    optimizer = Optimizer(model, CONFIG, forward_dtype)
    loader = Loader(data.split("train"), 4, 32, bos=data.tokenizer.bos)
    return TrainStep(model, optimizer), RunState(optimizer, loader, Budget(60.0, untimed_steps=2))


def train_steps(step: TrainStep, state: RunState, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        loss, good = step([next(state.loader)], StepValues(state.step, 1.0, 0.85, 0.2))
        assert good
        losses.append(loss.item())
        state.budget.add(0.5)
        state.average.update(losses[-1])
    return losses


def draws() -> list:
    return [torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()]


@pytest.mark.parametrize("forward_dtype", [torch.float32, torch.bfloat16])
def test_everything_comes_back(corpus, tmp_path, forward_dtype):
    step, state = make_state(corpus, 1, forward_dtype)
    train_steps(step, state, 5)
    state.blocked_seconds = 0.25
    checkpoints = Checkpointer(tmp_path / "checkpoints", state, 60.0, ORIGIN)
    checkpoints.written = 0
    (tmp_path / "metrics.jsonl").touch()
    checkpoints.save()
    expected = draws(), train_steps(step, state, 3)  # while it is being written
    checkpoints.wait()

    other, restored = make_state(corpus, 2, forward_dtype)
    train_steps(other, restored, 2)
    checkpoint = newest_checkpoint(tmp_path / "checkpoints")
    restored.restore(checkpoint.values, checkpoint.tensors())
    assert restored.budget == Budget(60.0, untimed_steps=2, step=5, timed_steps=3, timed_seconds=1.5, untimed_seconds=1)
    assert restored.resumes == 1
    assert restored.blocked_seconds >= 0.25
    for name, parameter in other.model.named_parameters():
        assert torch.equal(parameter, restored.optimizer.masters[name].to(parameter.dtype)), name
    assert (draws(), train_steps(other, restored, 3)) == expected
    assert restored.average == state.average
    for name, tensor in restored.optimizer.state().items():
        assert torch.equal(tensor, state.optimizer.state()[name]), name
    for loader in (state.loader, restored.loader):
        loader.close()


def test_the_state_is_all_that_the_optimizer_has(corpus):
    """Every fp32 tensor that it and its groups hold is in the state, or is a gradient, or is filled anew each step."""
    _, state = make_state(corpus, 1)
    held = {tensor.data_ptr() for tensor in state.optimizer.state().values()}
    names = list(state.optimizer.state())
    assert len(names) == len(set(names))
    for group in state.optimizer.groups:
        for value in vars(group).values():
            for tensor in value if isinstance(value, list) else [value]:
                if isinstance(tensor, torch.Tensor) and not is_gradient(tensor, state.optimizer):
                    assert tensor.untyped_storage().data_ptr() in held
    total = sum(p.numel() for p in state.optimizer.masters.values())
    masters = [tensor for name, tensor in state.optimizer.state().items() if name.startswith("master.")]
    assert sum(tensor.numel() for tensor in masters) == total


def is_gradient(tensor: torch.Tensor, optimizer: Optimizer) -> bool:
    buffers = [each.untyped_storage().data_ptr() for each in (optimizer.grads, optimizer.sums)]
    return tensor.untyped_storage().data_ptr() in buffers


def test_a_checkpoint_of_another_model_is_refused(corpus):
    _, state = make_state(corpus, 1)
    tensors = {name: tensor.clone() for name, tensor in state.optimizer.state().items()}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    tensors["exp_avg.wte"] = torch.ones(3, 3)
    with pytest.raises(InputError, match=r"exp_avg\.wte is float32 \[3, 3\] there and float32 \[512, 64\] here"):
        state.restore({}, tensors)
    del tensors["exp_avg.wte"]
    with pytest.raises(InputError, match=r"exp_avg\.wte is missing there"):
        state.restore({}, tensors)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.optimizer.state().items())


def test_the_library_reads_what_is_written(tmp_path):
    tensors = {"a": torch.randn(5, 3).T, "b": torch.randn(()), "é": torch.randn(2, 0, 3), "c": torch.randn(7)}
    tensors |= {str(t): torch.arange(3, 8).to(t) for t in (torch.uint8, torch.int32, torch.int64)}
    path = tmp_path / "x.safetensors"
    save_tensors(path, tensors)
    for read in (load_file(path), load_tensors(path, "write it again")):
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
        assert all(read[name].dtype == tensor.dtype for name, tensor in tensors.items())
        assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in read.values())
    assert len(header(tensors)) % 8 == 0
    assert os.listdir(tmp_path) == ["x.safetensors"]


HEADER = header({"x": torch.empty(1000)})


def write(folder, step: int) -> None:
    data = np.full(1000, step, dtype=np.float32)
    write_checkpoint(folder, {"step": step, "text": f"of {step}"}, HEADER, memoryview(data).cast("B"))


def check(checkpoint) -> int:
    """That it is whole and one thing. Returns its step."""
    assert checkpoint.values["text"] == f"of {checkpoint.step}"
    assert torch.equal(checkpoint.tensors()["x"], torch.full((1000,), float(checkpoint.step)))
    return checkpoint.step


class CrashError(BaseException):
    """The process is gone: nothing of the program handles it."""


class Disk:
    """Calls `fails` in place of the system's call number `at`; notes which files were synced, and every call."""

    def __init__(self, monkeypatch, at: int | None = None, fails=None):
        self.at, self.fails = at, fails
        self.calls: list[str] = []
        self.synced = set()
        for name in ("mkdir", "replace", "unlink", "rmdir", "fsync"):
            monkeypatch.setattr(os, name, self.counted(name, getattr(os, name)))
        monkeypatch.setattr(train.resilience.durable, "open", self.open, raising=False)

    def counted(self, name, call):
        def counting(*args, **kwargs):
            self.count(name)
            result = call(*args, **kwargs)
            if name == "fsync":
                self.synced.add(os.fstat(args[0]).st_ino)
            return result

        return counting

    def count(self, name: str) -> None:
        self.calls.append(name)
        if len(self.calls) - 1 == self.at:
            self.fails()

    def open(self, path, mode):
        self.count("open")
        file = builtins.open(path, mode, buffering=0)  # noqa: SIM115 -- closed by what stands for it
        raw_write = file.write
        disk = self

        class Half:
            """Half of each piece is there before the write is counted, and may fail."""

            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def write(self, data):
                raw_write(data[: len(data) // 2])
                disk.count("write")
                raw_write(data[len(data) // 2 :])

            def flush(self):
                pass

            def fileno(self):
                return file.fileno()

        return Half()

    def lose_what_is_not_synced(self, folder) -> None:
        """A power cut: names may be there before contents are."""
        for path in folder.rglob("*"):
            if path.is_file() and path.stat().st_ino not in self.synced:
                os.truncate(path, 0)


def crash():
    raise CrashError


def disk_full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def three(tmp_path):
    """Steps 2 and 3 are there; 1 has been removed."""
    for step in (1, 2, 3):
        write(tmp_path / "checkpoints", step)
    return tmp_path / "checkpoints"


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """What the system is asked for by one checkpoint, with two before it."""
    folder = tmp_path_factory.mktemp("calls") / "checkpoints"
    for step in (1, 2):
        write(folder, step)
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch)
        write(folder, 3)
    return disk.calls


def test_what_is_synced_before_what(calls):
    file = ["open", "write", "fsync"]
    assert calls[:1] == ["mkdir"]
    tensors = ["open", "write", "write", "fsync"]
    assert calls[1:15] == [*tensors, *file, *file, "fsync", "replace", "fsync", "replace"]
    assert set(calls[15:]) == {"unlink", "rmdir"}


@pytest.mark.parametrize("power_cut", [False, True], ids=["killed", "power cut"])
def test_a_crash_at_any_call_leaves_a_good_one(three, tmp_path, calls, power_cut):
    found = []
    for at in range(len(calls)):
        folder = tmp_path / f"crash-{at}"
        shutil.copytree(three, folder)
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, at, crash)
            disk.synced = {path.stat().st_ino for path in folder.rglob("*")}  # what was there before
            with pytest.raises(CrashError):
                write(folder, 4)
        if power_cut:
            disk.lose_what_is_not_synced(folder)
        found.append(check(newest_checkpoint(folder)))
        # The next one finds its way, whatever was left lying about.
        write(folder, 5)
        assert check(newest_checkpoint(folder)) == 5
        assert [path.name for path in folder.iterdir() if path.suffix == ".part"] == []
        assert len(checkpoint_folders(folder)) == 2
        assert check(read_checkpoint(checkpoint_folders(folder)[1])) == found[-1]
    assert found == sorted(found)
    assert set(found) == {3, 4}


def test_a_disk_that_is_full_at_any_call(corpus, three, tmp_path, calls, capsys):
    _, state = make_state(corpus, 1)
    for at in range(len(calls)):
        run = tmp_path / f"full-{at}"
        shutil.copytree(three, run / "checkpoints")
        (run / "metrics.jsonl").touch()
        checkpoints = Checkpointer(run / "checkpoints", state, 60.0, {})
        checkpoints.header, checkpoints.bytes = HEADER, memoryview(np.full(1000, 4, np.float32)).cast("B")
        shutil.rmtree(run / "checkpoints")  # of later steps than the state's, and therefore removed by it
        shutil.copytree(three, run / "checkpoints")
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, at + 1, disk_full)  # one call for metrics.jsonl
            checkpoints._write({"step": 4, "text": "of 4"})
        err = capsys.readouterr().err
        there = check(newest_checkpoint(run / "checkpoints"))
        assert there == 4 if at > calls.index("replace") else there == 3
        # Said also where it has its name and the renaming may be lost. What is not removed is no loss.
        assert ("no checkpoint of step 4" in err and "No space left" in err) == (calls[at] not in ("unlink", "rmdir"))
        assert all(check(read_checkpoint(path)) for path in checkpoint_folders(run / "checkpoints"))
        assert not (run / "checkpoints" / "step-00000004.part").exists()
        checkpoints._write({"step": 4, "text": "of 4"})  # there is room again
        assert check(newest_checkpoint(run / "checkpoints")) == 4


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "SHA256SUMS"])
def test_damage_is_found(three, tmp_path, name, capsys):
    """Cut short, a bit changed, gone: each is read as a damaged checkpoint, and the one before is taken."""
    rng = random.Random(4)
    whole = (three / "step-00000003" / name).read_bytes()
    cuts = [whole[: rng.randrange(len(whole))] for _ in range(20)]
    flips = []
    for _ in range(40):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        flips.append(bytes(damaged))
    for content in [*cuts, *flips, None, whole + b"x"]:
        path = three / "step-00000003" / name
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DamagedError):
            read_checkpoint(three / "step-00000003")
        assert check(newest_checkpoint(three)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 62
    assert all("step-00000003" in line for line in lines)


def test_what_only_looks_like_a_checkpoint(three):
    (three / "step-00000009").write_text("a file")
    (three / "step-00000008").mkdir()
    (three / "step-x").mkdir()
    (three / "step-00000007.part").mkdir()
    other = shutil.copytree(three / "step-00000003", three / "step-00000006")
    before = hashlib.sha256((other / "state.json").read_bytes()).hexdigest()
    for text, named in [(json.dumps({"format": 99}), "format 1"), ("[1]", "format 1"), ("{", "no JSON")]:
        (other / "state.json").write_text(text)
        after = hashlib.sha256(text.encode()).hexdigest()
        (other / "SHA256SUMS").write_text((other / "SHA256SUMS").read_text().replace(before, after))
        before = after
        with pytest.raises(DamagedError, match=named):
            read_checkpoint(other)
    assert check(newest_checkpoint(three)) == 3


def test_no_snapshot_while_one_is_being_written(corpus, tmp_path, monkeypatch):
    """The buffer is the writer's until it is done: `due` says no, and `save` waits."""
    step, state = make_state(corpus, 1)
    (tmp_path / "metrics.jsonl").touch()
    may_go_on, write = threading.Event(), train.resilience.checkpoint.write_checkpoint

    def slow(*args):
        assert may_go_on.wait(timeout=600)
        write(*args)

    monkeypatch.setattr(train.resilience.checkpoint, "write_checkpoint", slow)
    checkpoints = Checkpointer(tmp_path / "checkpoints", state, 0.0, ORIGIN)
    assert not checkpoints.due()  # nothing done yet
    train_steps(step, state, 1)
    assert checkpoints.due()
    checkpoints.save()
    at_one = {name: tensor.clone() for name, tensor in state.optimizer.state().items()}
    train_steps(step, state, 1)
    assert not checkpoints.due()
    second = threading.Thread(target=checkpoints.save)
    second.start()
    second.join(timeout=0.2)
    assert second.is_alive()
    may_go_on.set()
    second.join()
    checkpoints.wait()
    newer, older = (read_checkpoint(path) for path in checkpoint_folders(tmp_path / "checkpoints"))
    assert (newer.step, older.step) == (2, 1)
    for checkpoint, expected in ((older, at_one), (newer, state.optimizer.state())):
        tensors = checkpoint.tensors()
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert not checkpoints.due()
    checkpoints.save()  # this step has its checkpoint
    assert checkpoints.writer is None
    state.loader.close()
