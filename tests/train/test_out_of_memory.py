"""Running out of memory: one line that says what would fit."""

import json
import re
import signal

import pytest
import torch

import train.trainer
from tests.helpers.tiny_run import run_main
from train import evaluate, memory
from train.config import TrainConfig, resolve
from train.resilience.signals import Interrupted
from train.resilience.watchdog import HangError
from train.results.ledger import Ledger
from train.results.record import Record
from train.step import TrainStep

TINY = {"depth": 2, "d_model": 64, "head_dim": 16, "seq_len": 32, "device_batch_size": 64, "total_batch_size": 2048}
ERRORS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried"),
    "onednn": RuntimeError("could not create a primitive"),
    "python": MemoryError(),
}


def refused(corpus, folder, capsys, *args: str) -> str:
    assert run_main(corpus, folder, "--steps", "3", "--untimed-steps", "0", *args) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: out of memory")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("when", ["rehearsal", "training"])
def test_the_batch_that_fits_is_named(corpus, tmp_path, capsys, monkeypatch, when, error):
    """More than four rows are too many here; eight are asked for, of a step of eight, so four it is."""
    micro_step, calls = TrainStep.micro_step, 0

    def full(self, tokens, *args):
        nonlocal calls
        calls += 1
        if tokens.numel() > 4 * 33 and (when != "training" or calls > 4):  # 3 rehearsals, and a step
            raise error
        return micro_step(self, tokens, *args)

    monkeypatch.setattr(TrainStep, "micro_step", full)
    rows = ["--device-batch-size", "8", "--total-batch-size", str(8 * 32)]
    line = refused(corpus, tmp_path / "a", capsys, *rows)
    named = re.search(r"8 rows of 32 tokens: use --device-batch-size (\d+)\n", line)
    assert named[1] == "4"
    rows[1] = named[1]
    assert run_main(corpus, tmp_path / "b", "--steps", "3", "--untimed-steps", "0", *rows) == 0


def test_what_is_free_now_is_what_counts(corpus, tmp_path, capsys, monkeypatch):
    """Another process has taken memory since the start: far fewer rows fit than half of those that did not."""
    rows = ["--device-batch-size", "64", "--total-batch-size", str(64 * 32)]

    def full(self, *_):
        config = resolve(TrainConfig(ops="reference", **TINY), "cpu")
        two = memory.count(config, self.model.config, 2)
        monkeypatch.setattr(memory, "available_bytes", lambda _: two.on("cpu") - memory.STATE_MARGIN * two.state)
        raise ERRORS["cuda"]

    monkeypatch.setattr(memory, "available_bytes", lambda _: 2**40)
    monkeypatch.setattr(TrainStep, "micro_step", full)
    assert "use --device-batch-size 2\n" in refused(corpus, tmp_path / "run", capsys, *rows)


def test_a_capture_that_runs_out(corpus, tmp_path, capsys, monkeypatch):
    """The error that it ends with is another."""

    def capture(self, *_):
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
        monkeypatch.setattr(memory, "available_bytes", lambda _: 0)
        raise ERRORS["cuda"]

    monkeypatch.setattr(TrainStep, "micro_step", full)
    assert "less than one row needs: lower --seq-len or --depth" in refused(corpus, tmp_path / "run", capsys)


def test_before_there_is_a_model(corpus, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise ERRORS["cpu"]

    monkeypatch.setattr(train.trainer, "Optimizer", full)
    assert "lower --depth" in refused(corpus, tmp_path / "run", capsys)


def full_beyond(rows: int, monkeypatch, error: Exception = ERRORS["cuda"]) -> list[int]:
    """More tokens than are in these rows run out of memory where they are scored. Returns a list that takes down how
    many were."""
    losses, scored = TrainStep.token_losses, []

    def full(self, tokens, *args):
        if tokens.numel() > rows * self.model.config.seq_len:
            raise error
        scored.append(tokens.numel())
        return losses(self, tokens, *args)

    monkeypatch.setattr(TrainStep, "token_losses", full)
    return scored


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_scoring_goes_on_with_fewer_rows_at_a_time(corpus, tmp_path, capsys, monkeypatch, error):
    """The evaluation and the audit: the same rows, and the same number."""
    rows = ["--device-batch-size", "8", "--total-batch-size", str(8 * 32), "--steps", "2", "--eval-tokens", "1000"]
    assert run_main(corpus, tmp_path / "whole", *rows) == 0
    scored = full_beyond(2, monkeypatch, error)
    assert run_main(corpus, tmp_path / "halved", *rows) == 0
    assert max(scored) == 2 * 32
    err = capsys.readouterr().err.splitlines()
    assert err == [f"note: out of memory: going on with {n} rows at a time" for n in (4, 2, 4, 2)]
    whole, halved = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "halved"))
    assert float(halved["val_bpb"]) == pytest.approx(float(whole["val_bpb"]), rel=1e-5)
    assert halved["fingerprint"] == whole["fingerprint"]


@pytest.mark.parametrize(
    ("error", "said"),
    [(ERRORS["cuda"], "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."),
     (ValueError("no such\nthing"), "ValueError: no such thing"),
     (Interrupted(signal.SIGINT), "interrupted")],
    ids=["memory", "a fault", "a signal"],
)  # fmt: skip
def test_what_was_measured_outlives_an_audit_that_cannot_be_done(corpus, tmp_path, capsys, monkeypatch, error, said):
    """In the row, whatever ends the run after its evaluation; where the run goes on, in its folder too."""

    def audit(*args, **kwargs):
        raise error

    monkeypatch.setattr(train.trainer, "audit", audit)
    code = run_main(corpus, tmp_path / "run", "--steps", "2", "--eval-tokens", "1000")
    entry = Ledger(tmp_path).runs()[-1]
    assert entry["outcome"] == "finished"
    assert 2 < entry["val_bpb"] < 20
    assert entry["audit"] == f"not done: {said}"
    assert (entry["status"], entry["verdict"]) == ("discard", "not compared")
    if isinstance(error, Interrupted):
        assert code == 130
        return
    assert code == 1
    out = capsys.readouterr().out
    assert f"FAIL: audit: not done: {said}" in out
    assert f"val_bpb:               {entry['val_bpb']:.6f}" in out
    assert float(json.loads((tmp_path / "run" / "summary.json").read_text())["val_bpb"]) > 2
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_what_was_measured_outlives_a_hang(corpus, tmp_path, monkeypatch):
    """The watchdog's thread writes the row, and ends the process."""
    measured = Record.measured

    def hangs(self, *args):
        measured(self, *args)
        self.fail(HangError("no step for 600 s"))
        raise SystemExit(1)

    monkeypatch.setattr(Record, "measured", hangs)
    with pytest.raises(SystemExit):
        run_main(corpus, tmp_path / "run", "--steps", "2", "--eval-tokens", "1000")
    (entry,) = Ledger(tmp_path).runs()
    assert 2 < entry["val_bpb"] < 20
    assert (entry["outcome"], entry["audit"]) == ("finished", "not done: no step for 600 s")
    assert (entry["status"], entry["verdict"]) == ("discard", "not compared")


def test_evaluating_a_finished_run(small_run, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        scored = full_beyond(1, patch)
        assert evaluate.main([str(small_run), "--device", "cpu"]) == 0
        assert max(scored) == 16
        assert capsys.readouterr().err == "note: out of memory: going on with 1 row at a time\n"
    full_beyond(0, monkeypatch)
    assert evaluate.main([str(small_run), "--device", "cpu"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: out of memory, with one row at a time: free memory, or take --device cpu"
    )


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
