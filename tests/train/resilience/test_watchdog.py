"""A run that hangs says where, and ends."""

import faulthandler
import json
import os
import re
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

import train.__main__
import train.resilience.watchdog
import train.trainer
from prepare.words import command_line
from train.resilience.watchdog import ALARM, FLOOR, Watchdog

TINY = [
    "--device", "cpu", "--depth", "1", "--d-model", "32", "--head-dim", "16", "--seq-len", "16", "--no-autocast",
    "--device-batch-size", "2", "--total-batch-size", "32", "--checkpoint-every", "0",
]  # fmt: skip

# Each makes a step after the fourth hang, in a way of its own; all but the last let other threads run. The last would
# stop the thread that writes the checkpoint as well, so the hang waits until there is one.
HANGS = {
    "the loader": "Loader._pack = late(Loader._pack, lambda: threading.Event().wait())",
    "C code": "TrainStep.micro_step = late(TrainStep.micro_step, lambda: ctypes.CDLL(None).sleep(1000))",
    "Python's lock": "TrainStep.micro_step = late(TrainStep.micro_step, lambda: ctypes.PyDLL(None).sleep(1000))",
}
PROGRAM = """
import ctypes, pathlib, sys, threading, time
import train.resilience.watchdog
from prepare.words import command_line
from prepare import Loader
from prepare.words import command_line
from train.__main__ import main
from train.step import TrainStep

limits, hangs = train.resilience.watchdog.Watchdog.limits, threading.Event()
# On a busy machine what comes before may take longer than the hang is given.
train.resilience.watchdog.Watchdog.limits = lambda self: limits(self) if hangs.is_set() else (600.0, 600.0)

def late(function, hang):
    calls = iter(range(10**9))
    checkpoints = pathlib.Path(sys.argv[sys.argv.index("--run-dir") + 1], "checkpoints")
    def called(*args):
        if next(calls) >= 4 and any(path.suffix != ".part" for path in checkpoints.glob("*")):
            hangs.set()
            time.sleep(1.0)  # two looks, after which the limit is the hang's
            hang()
        return function(*args)
    return called

"""


def start(small_data, run, hang: str, timeout: str, grace: float) -> subprocess.Popen:
    program = PROGRAM + f"train.resilience.watchdog.GRACE = {grace}\n{hang}\nsys.exit(main(sys.argv[1:]))"
    folders = ["--data", str(small_data), "--run-dir", str(run)]
    return subprocess.Popen(
        [sys.executable, "-c", program, *TINY, *folders, "--hang-timeout", timeout, "--time-budget", "600"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("where", HANGS)
def test_a_run_that_hangs_is_ended(small_data, tmp_path, where):
    process = start(small_data, tmp_path / "run", HANGS[where], "2", grace=1)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 1
    if where == "Python's lock":
        assert "Timeout (0:0" in err  # faulthandler's own word: no thread of Python's could run
        assert "in called" in err
    else:
        last = out.splitlines()[-1]
        # Two seconds, or ten of this machine's steps where those take longer: beside other work they may.
        again = re.escape(command_line("train", "--resume", tmp_path / "run"))
        said = re.fullmatch(rf"FAIL: no step for (\d+) s; to go on from step \d+: {again}", last)
        assert int(said[1]) >= 2
        row = json.loads((tmp_path / "results.jsonl").read_text())
        assert (row["status"], row["verdict"]) == ("crash", "failed")
        assert row["note"].startswith(f"no step for {said[1]} s, after ")
        assert err.count("this is where every thread stands") == 1
        assert "thread MainThread:" in err
        stuck = "loader" if where == "the loader" else "MainThread"
        stack = err.partition(f"thread {stuck}:")[2].partition("\nthread ")[0]
        assert "in late.<locals>.called" in stack
        assert "in <lambda>" in stack
    # The files are whole, and the run goes on from the checkpoint that it has.
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [*range(len(rows))]
    assert len(rows) >= 1
    checkpoints = [p for p in (tmp_path / "run" / "checkpoints").iterdir() if p.suffix != ".part"]
    assert checkpoints


class Written(list):
    """What the watchdog writes, and its wish to end the process, without either."""

    def __init__(self, monkeypatch):
        super().__init__()
        monkeypatch.setattr(train.resilience.watchdog, "write", lambda fd, text: self.append((fd, text)))
        monkeypatch.setattr(train.resilience.watchdog, "POLL", 0.01)
        monkeypatch.setattr(os, "_exit", self.exit)
        self.ended = None

    def exit(self, code):
        self.ended = code
        raise SystemExit  # ends the watchdog's thread


def test_one_hang_is_shown_once_and_goes_by(monkeypatch):
    written = Written(monkeypatch)
    with Watchdog(600.0) as watchdog:
        for _ in range(2):
            monkeypatch.setattr(train.resilience.watchdog, "FLOOR", 600.0)  # a busy machine's pauses are no hangs
            for _ in range(5):
                time.sleep(0.01)
                watchdog.beat()
            monkeypatch.setattr(train.resilience.watchdog, "FLOOR", 0.2)
            deadline = time.monotonic() + 600
            shown = len(written)
            while len(written) == shown and time.monotonic() < deadline:
                time.sleep(0.02)
            time.sleep(0.3)
            assert len(written) == shown + 1
    assert written.ended is None
    assert all(fd == 2 and "test_one_hang_is_shown_once" in text for fd, text in written)


def test_what_is_usual_sets_the_limits():
    watchdog = Watchdog(600.0)
    assert watchdog.limits() == (600.0, 600.0)  # before the first steps kernels compile
    watchdog._recent.extend([0.1] * 20)
    assert watchdog.limits() == (FLOOR, 600.0)
    watchdog._recent.extend([20.0] * 40)
    assert watchdog.limits() == (ALARM * 20.0, 600.0)
    watchdog._recent.extend([100.0] * 40)
    assert watchdog.limits() == (1000.0, 1000.0)  # no run ends for the steps it always makes
    assert Watchdog(5.0).limits() == (5.0, 5.0)


def test_the_first_step_does_not_count_as_usual():
    watchdog = Watchdog(600.0)
    time.sleep(0.05)
    watchdog.beat()
    assert not watchdog._recent
    watchdog.beat()
    assert len(watchdog._recent) == 1


@pytest.fixture
def now(monkeypatch):
    """The watchdog's clock, which goes on where a test says so."""
    clock = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(train.resilience.watchdog, "monotonic", lambda: clock.seconds)
    return clock


def beats(watchdog: Watchdog, now, seconds: float, count: int = 3) -> None:
    for _ in range(count):
        now.seconds += seconds
        watchdog.beat()


def test_the_pace_of_one_phase_says_nothing_of_the_next(now):
    watchdog = Watchdog(600.0)
    beats(watchdog, now, 4.0)
    assert watchdog.limits() == (40.0, 600.0)
    watchdog.phase()
    assert watchdog.limits() == (600.0, 600.0)
    beats(watchdog, now, 500.0, count=1)  # compiling
    assert watchdog.limits() == (600.0, 600.0)
    beats(watchdog, now, 5.0)
    assert watchdog.limits() == (50.0, 600.0)


def test_a_slow_machine_stays_slow(now):
    """Where a step takes 200 seconds, 600 without a beat end no evaluation either."""
    watchdog = Watchdog(600.0)
    beats(watchdog, now, 200.0)
    for _ in range(2):
        watchdog.phase()
        assert watchdog.limits() == (2000.0, 2000.0)


def test_new_shapes_are_a_phase_of_their_own(now):
    """As under torch.compile: each makes kernels anew, the last batch of an evaluation like the first."""
    watchdog, limits = Watchdog(600.0), []

    def losses(inputs, targets):
        limits.append(watchdog.limits()[0])
        now.seconds += 2.0
        return inputs[:1]

    score = watchdog.watching(losses)
    for rows in (4, 4, 4, 3, 4, 4, 2):
        assert score(torch.zeros(rows, 8), targets := torch.zeros(rows, 8)).shape == targets[:1].shape
    assert limits == [600.0, 600.0, FLOOR, 600.0, 600.0, FLOOR, 600.0]


class Phases(Watchdog):
    """Notes what was done in each phase."""

    seen: list[list[str]]

    def phase(self):
        super().phase()
        Phases.seen.append([])


def test_what_is_no_step_is_no_phase_of_the_steps(small_data, tmp_path, monkeypatch):
    """The last checkpoint, the evaluation and the audit each begin without a pace, and so does writing the files."""
    Phases.seen = [[]]

    def noting(where, name, word):
        function = getattr(where, name)

        def noted(*args, **kwargs):
            Phases.seen[-1].append(word)
            return function(*args, **kwargs)

        monkeypatch.setattr(where, name, noted)

    monkeypatch.setattr(train.trainer, "Watchdog", Phases)
    noting(train.trainer, "train", "steps")
    noting(train.trainer.Checkpointer, "save", "checkpoint")
    noting(train.trainer, "evaluate_bpb", "evaluation")
    noting(train.trainer, "audit", "audit")
    noting(train.trainer.RunFolder, "write_model", "files")
    options = ["--data", str(small_data), "--run-dir", str(tmp_path / "run"), "--steps", "2"]
    assert train.__main__.main([*TINY, "--checkpoint-every", "600", *options]) == 0
    found = [words for words in Phases.seen if words]
    assert found == [["steps"], ["checkpoint"], ["evaluation"], ["audit"], ["files"]]


def test_a_stopped_process_does_not_hang(monkeypatch):
    """Stopped for 1,000 seconds, as by Ctrl-Z: the clock jumps, and what has passed is one look's time."""
    written, jump = Written(monkeypatch), 0.0
    monkeypatch.setattr(train.resilience.watchdog, "monotonic", lambda: time.monotonic() + jump)
    with Watchdog(100.0) as watchdog:
        watchdog.beat()
        time.sleep(0.1)
        jump = 1000.0
        time.sleep(0.3)
        assert watchdog._thread.is_alive()
    assert (written, written.ended) == ([], None)


@pytest.mark.parametrize(("at_the_end", "line"), [
    (lambda reason: f"{type(reason).__name__}, and so on", "FAIL: no step for 1 s; HangError, and so on"),
    (lambda reason: "", "FAIL: no step for 1 s"),  # no checkpoint
    (lambda reason: threading.Event().wait(), "FAIL: no step for 1 s"),  # the disk is what hangs
    (lambda reason: 1 / 0, "FAIL: no step for 1 s"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_end(monkeypatch, at_the_end, line):
    monkeypatch.setattr(train.resilience.watchdog, "LAST_WORDS", 0.2)
    written = Written(monkeypatch)
    with Watchdog(0.5, at_the_end) as watchdog:
        watchdog._thread.join(20)
    assert written.ended == 1
    assert written[-1] == (1, f"\n{line}\n")


def test_off(monkeypatch):
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *_, **__: pytest.fail("armed"))
    with Watchdog(0.0) as watchdog:
        watchdog.beat()
        assert not watchdog._thread.is_alive()


def test_a_beat_costs_nothing_measurable():
    watchdog = Watchdog(600.0)
    start = time.process_time()
    for _ in range(100_000):
        watchdog.beat()
    assert (time.process_time() - start) / 100_000 < 20e-6  # a step takes milliseconds; here a beat takes 0.3 µs


def test_nobody_reads(monkeypatch):
    """A pipe that is full does not hold the end up."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(writer, True)
    wait = train.resilience.watchdog.select.select
    monkeypatch.setattr(train.resilience.watchdog.select, "select", lambda r, w, e, _: wait(r, w, e, 0.05))
    train.resilience.watchdog.write(writer, "no step")
    os.close(reader)
    os.close(writer)
