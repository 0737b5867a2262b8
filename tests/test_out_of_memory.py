"""Running out of memory: one line that says what would fit."""

import re

import pytest
import torch
from tiny_run import run_main

import train.trainer
from train import evaluate, memory
from train.step import TrainStep

ERRORS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried"),
    "python": MemoryError(),
}


def refused(corpus, folder, capsys, *args: str) -> str:
    assert run_main(corpus, folder, "--steps", "3", "--untimed-steps", "0", *args) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: out of memory")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("when", ["rehearsal", "training", "evaluation"])
def test_the_batch_that_fits_is_named(corpus, tmp_path, capsys, monkeypatch, when, error):
    """More than four rows are too many here; eight are asked for, of a step of eight, so four it is."""
    micro_step, losses, calls = TrainStep.micro_step, TrainStep.token_losses, 0

    def full(self, tokens, *args):
        nonlocal calls
        calls += 1
        if tokens.numel() > 4 * 33 and (when != "training" or calls > 4):  # 3 rehearsals, and a step
            raise error
        return (losses if when == "evaluation" else micro_step)(self, tokens, *args)

    monkeypatch.setattr(TrainStep, "token_losses" if when == "evaluation" else "micro_step", full)
    rows = ["--device-batch-size", "8", "--total-batch-size", str(8 * 32)]
    line = refused(corpus, tmp_path / "a", capsys, *rows)
    named = re.search(r"8 rows of 32 tokens: use --device-batch-size (\d+)\n", line)
    assert named[1] == "4"
    rows[1] = named[1]
    assert run_main(corpus, tmp_path / "b", "--steps", "3", "--untimed-steps", "0", *rows) == 0


def test_what_is_free_now_is_what_counts(corpus, tmp_path, capsys, monkeypatch):
    """Another process has taken memory since the start: far fewer rows fit than half of those that did not."""
    def full(self, *_):
        raise ERRORS["cuda"]

    per_row = []
    count = memory.activation_bytes
    monkeypatch.setattr(memory, "activation_bytes", lambda *args: per_row.append(count(*args)) or per_row[-1])
    monkeypatch.setattr(TrainStep, "micro_step", full)
    margin, overhead = memory.MARGIN["cpu"], memory.OVERHEAD["cpu"]
    monkeypatch.setattr(memory, "available_bytes", lambda _: overhead + 2.5 * per_row[0] * margin if per_row else 2**40)
    rows = ["--device-batch-size", "64", "--total-batch-size", str(64 * 32)]
    assert "use --device-batch-size 2\n" in refused(corpus, tmp_path / "run", capsys, *rows)


def test_a_capture_that_runs_out(corpus, tmp_path, capsys, monkeypatch):
    """The error that it ends with is another, and so is that of whatever is tried on the device afterwards."""

    def unusable(*_):
        raise RuntimeError("captures_underway")

    def capture(self, *_):
        monkeypatch.setattr(memory, "activation_bytes", unusable)
        try:
            raise ERRORS["cuda"]
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    monkeypatch.setattr(TrainStep, "micro_step", capture)
    rows = ["--device-batch-size", "8", "--total-batch-size", str(8 * 32)]
    assert "use --device-batch-size 4\n" in refused(corpus, tmp_path / "run", capsys, *rows)


def test_an_error_that_hides_what_came_before_speaks_for_itself():
    try:
        raise ERRORS["cuda"]
    except RuntimeError:
        with pytest.raises(RuntimeError) as other:
            raise RuntimeError("another") from None
    assert not memory.is_out_of_memory(other.value)


def test_not_even_one_row(corpus, tmp_path, capsys, monkeypatch):
    def full(self, *_):
        monkeypatch.setattr(memory, "activation_bytes", full)
        raise ERRORS["cuda"]

    monkeypatch.setattr(TrainStep, "micro_step", full)
    assert "less than one row needs: lower --seq-len or --depth" in refused(corpus, tmp_path / "run", capsys)


def test_before_there_is_a_model(corpus, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise ERRORS["cpu"]

    monkeypatch.setattr(train.trainer, "Optimizer", full)
    assert "lower --depth" in refused(corpus, tmp_path / "run", capsys)


def test_evaluating_a_finished_run(small_run, capsys, monkeypatch):
    losses = TrainStep.token_losses

    def full(self, tokens, *args):
        if len(tokens) > 1:
            raise ERRORS["cuda"]
        return losses(self, tokens, *args)

    monkeypatch.setattr(TrainStep, "token_losses", full)
    assert evaluate.main([str(small_run), "--device", "cpu"]) == 2
    assert capsys.readouterr().err == "error: out of memory: take fewer rows at a time with --device-batch-size\n"
    assert evaluate.main([str(small_run), "--device", "cpu", "--device-batch-size", "1"]) == 0


def test_other_errors_stay_what_they_are(corpus, tmp_path, monkeypatch):
    def broken(self, *_):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(TrainStep, "micro_step", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        run_main(corpus, tmp_path / "run", "--steps", "1")


def test_what_a_control_group_leaves_is_what_is_free(monkeypatch):
    monkeypatch.setattr(memory, "control_group_bytes", lambda: 1000)
    assert memory.available_bytes("cpu") == 1000
    for more in (None, 2**62):
        monkeypatch.setattr(memory, "control_group_bytes", lambda more=more: more)
        assert 1000 < memory.available_bytes("cpu") < 2**50
