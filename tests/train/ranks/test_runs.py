"""Whole runs on several ranks: their files, their bits, and how they end when one of the ranks does.

`TIMEBOX_KILLS=20 pytest tests/train/ranks` kills as often as it says.
"""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

import train.__main__
from prepare import InputError
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_run import TINY, assert_same, losses, rows
from train.config import ROOT
from train.ranks import Ranks
from train.replay import main as replay
from train.resilience import checkpoint
from train.resilience.checkpoint import checkpoint_folders
from train.results.ledger import Ledger
from train.results.progress import Reporter, SilentReporter
from train.results.record import Record
from train.step import TrainStep

KILLS = int(os.environ.get("TIMEBOX_KILLS", "2"))
ARGS = ["--steps", "12", "--untimed-steps", "3", "--keep-checkpoints", "--eval-tokens", "2048",
        "--total-batch-size", "512"]  # four micro-steps


def go(size: int, folder: Path, *args: str, corpus: Path | None = None, **more):
    """A run in `folder`, or with --resume one that goes on."""
    given = ["--resume", str(folder)] if corpus is None else ["--data", str(corpus), "--run-dir", str(folder), *ARGS]
    return run_ranks(size, folder.parent / f"{folder.name}-streams", *given, *args, **more)


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "alone"
    ended = go(1, folder, corpus=corpus)
    assert ended[0].code == 0, ended
    return folder


def lines_of(ended) -> list[str]:
    """What all ranks have said of the end, and how to go on."""
    return [line for each in ended for line in (each.out + each.err).splitlines() if line.startswith(("FAIL", "error"))]


@pytest.mark.parametrize("size", [2, 4])
def test_a_run_is_the_same_on_any_number_of_ranks(alone, corpus, tmp_path, size):
    """Every byte of weights, moments and losses; one row, one voice."""
    ended = go(size, tmp_path / "run", corpus=corpus)
    assert [each.code for each in ended] == [0] * size, ended
    assert_same(tmp_path / "run", alone)
    assert all(each.out == each.err == "" for each in ended[1:])
    assert f"device: {size} ranks, each cpu, 1 thread" in ended[0].out
    assert "one alone makes the same bits: OMP_NUM_THREADS=1 " in ended[0].out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["audit"], summary["ranks"], summary["sums"]) == ("ok", size, "ordered")
    row, = Ledger(tmp_path).runs()
    assert row["machine"]["name"].startswith(f"{size}x ")
    assert row["ranks"] == [size]


def stop_at(step: int, rank: int, number: int):
    """What makes one rank get a signal when it has made a step."""
    return partial(_stop_at, step, rank, number)


def _stop_at(step: int, rank: int, number: int, here: int) -> None:
    if here != rank:
        return
    kind = SilentReporter if here else Reporter
    report = kind.step

    def reported(self, budget, *args):
        report(self, budget, *args)
        if budget.step == step + 1:
            os.kill(os.getpid(), number)

    kind.step = reported


def test_stopped_on_one_rank_and_continued_on_as_many_as_there_are(alone, corpus, tmp_path):
    """4 > 2 > 1 > 4 ranks: all stop at the step at which one was asked to."""
    folder = tmp_path / "run"
    ended = go(4, folder, corpus=corpus, before=stop_at(3, 2, signal.SIGTERM))
    assert [each.code for each in ended] == [143] * 4, ended
    assert [path.name for path in checkpoint_folders(folder / "checkpoints")] == ["step-00000004"]
    assert "terminated" in ended[0].err.splitlines()
    for size, step in ((2, 5), (1, 8)):
        ended = go(size, folder, before=stop_at(step, size - 1, signal.SIGINT))
        assert [each.code for each in ended] == [130] * size, ended
        assert f"step-{step + 1:08d}" in checkpoint_folders(folder / "checkpoints")[0].name
    assert [each.code for each in go(4, folder)] == [0] * 4
    assert_same(folder, alone)
    row, = Ledger(tmp_path).runs()
    assert row["ranks"] == [4, 2, 1, 4]
    assert row["summary"]["resumes"] == 3
    assert row["doubts"] == []  # by steps, no time is measured


def a_slow_row_of_what_is_stopped(rank: int) -> None:
    fail = Record.fail

    def slowly(self, error):
        time.sleep(1.0)
        fail(self, error)

    Record.fail = slowly
    _stop_at(3, 1, signal.SIGTERM, rank)


def test_the_others_wait_for_rank_0(corpus, tmp_path):
    """torchrun ends all processes as soon as one has failed: rank 0 has its row to write before that."""
    rows_then = {}

    def at_end(rank: int) -> None:
        rows_then[rank] = len(Ledger(tmp_path).runs())

    ended = go(2, tmp_path / "run", corpus=corpus, before=a_slow_row_of_what_is_stopped, at_end=at_end)
    assert [each.code for each in ended] == [143, 143], ended
    assert rows_then == {0: 1, 1: 1}


def killed_at(call: int, rank: int, here: int) -> None:
    """Kills one rank in the middle of sending gradients."""
    if here != rank:
        return
    send, calls = Ranks.all_to_all, iter(range(10**9))

    def sent(self, *args):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        send(self, *args)

    Ranks.all_to_all = sent


def test_a_rank_is_killed_and_the_run_goes_on(alone, corpus, tmp_path):
    """At any moment, on whichever rank: the others end within seconds, one line says how to go on, and the bits are
    those of a run that nothing disturbed."""
    rng = random.Random(5)
    for number in range(KILLS):
        folder, size = tmp_path / f"run-{number}", rng.choice([2, 4])
        rank, call = rng.randrange(size), rng.randrange(120)
        ended = go(size, folder, "--checkpoint-every", "0", corpus=corpus, before=partial(killed_at, call, rank))
        assert sorted(each.code for each in ended) == [-signal.SIGKILL] + [1] * (size - 1), ended
        line, = lines_of(ended)
        checkpoints = checkpoint_folders(folder / "checkpoints")
        assert line.startswith("FAIL: another rank is gone")
        assert ("to go on from step" in line) == bool(checkpoints)
        assert [run["outcome"] for run in Ledger(tmp_path).runs() if run["run"] == folder.name] == ["failed"]
        if not checkpoints:
            folder = folder.with_name(f"again-{number}")
        again = go(rng.choice([1, 2, 4]), folder, corpus=None if checkpoints else corpus)
        assert not any(each.code for each in again), again
        assert_same(folder, alone)
    print(f"{KILLS} of {KILLS} kills survived")


def killed_while_rank_0_writes(rank: int) -> None:
    write, speaks = checkpoint.write_checkpoint, Ranks.speaks

    def late(self) -> bool:
        time.sleep(0.0 if rank else 0.5)
        return speaks(self)

    Ranks.speaks = late

    def slowly(*args):
        time.sleep(3.0)  # longer than the others leave rank 0 to speak
        write(*args)

    checkpoint.write_checkpoint = slowly
    _stop_at(5, 3, signal.SIGKILL, rank)


def test_a_checkpoint_that_is_being_written_is_gone_on_from(corpus, tmp_path):
    """Rank 0 alone knows of it; the two others are quicker to see that one is gone."""
    ended = go(4, tmp_path / "run", "--checkpoint-every", "0", corpus=corpus, before=killed_while_rank_0_writes)
    line, = lines_of(ended)
    step = int(checkpoint_folders(tmp_path / "run" / "checkpoints")[0].name.removeprefix("step-"))
    assert f"; to go on from step {step}: " in line


def test_a_rank_that_stands_still_ends_the_run(corpus, tmp_path):
    """Within the timeout, with one line, and a row."""
    ended = go(2, tmp_path / "run", "--hang-timeout", "2", "--checkpoint-every", "0", corpus=corpus,
               before=stop_at(5, 1, signal.SIGSTOP))  # fmt: skip
    assert [each.code for each in ended] == [1, -signal.SIGKILL], ended
    line, = lines_of(ended)
    assert line.startswith("FAIL: no step for ")
    assert "to go on from step" in line
    row, = Ledger(tmp_path).runs()
    assert (row["outcome"], row["error"].startswith("no step for ")) == ("failed", True)


KILLER = """
import os, signal, sys
import train.__main__
from train.results.progress import Reporter, SilentReporter
attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
kind = SilentReporter if rank else Reporter
report = kind.step
def step(self, budget, *args):
    report(self, budget, *args)
    if (attempt, rank, budget.step) in ((0, 1, 4), (1, 0, 8)):
        os.kill(os.getpid(), signal.SIGKILL)
kind.step = step
sys.exit(train.__main__.main(sys.argv[1:]))
"""


def test_torchrun_starts_it_again_where_it_was(alone, corpus, tmp_path):
    """Two kills, one of rank 0: one run, and one row of it."""
    (tmp_path / "killer.py").write_text(KILLER)
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts",
               "2", str(tmp_path / "killer.py"), *TINY, *ARGS, "--data", str(corpus), "--run-dir", str(folder),
               "--checkpoint-every", "0"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_same(folder, alone)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["resumes"] == 2
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 1
    assert done.stdout.count("FAIL: another rank is gone") == 2


def nan_on_rank_1(rank: int) -> None:
    micro_step = TrainStep.micro_step
    made = iter(range(10**9))

    def broken(self, tokens, of):
        micro_step(self, tokens, of)
        if rank == 1 and next(made) == 9:
            self.optimizer.grads[7] = math.nan

    TrainStep.micro_step = broken


def test_a_bad_gradient_on_one_rank_ends_all_at_that_step(corpus, tmp_path, capsys):
    ended = go(2, tmp_path / "run", corpus=corpus, before=nan_on_rank_1)
    assert [each.code for each in ended] == [1, 1], ended
    line, = lines_of(ended)
    assert line.startswith("FAIL: step 00004: a gradient is not finite (batches 16 to 19); repeated at once, the step")
    assert len(losses(tmp_path / "run")) == 4
    assert train.__main__.main(["--resume", str(tmp_path / "run")]) == 2  # it has no checkpoint yet
    assert replay([str(tmp_path / "run")]) == 0  # all four micro-batches, and the masters of both ranks
    assert "step 00004: the loss and all gradients are good" in capsys.readouterr().out


def other_parameters_on_rank_1(rank: int) -> None:
    release = TrainStep.release

    def changed(self):
        release(self)
        if rank == 1:
            self.model.lambda_0.data[0] += 1e-6

    TrainStep.release = changed


def test_parameters_that_differ_are_a_finding(corpus, tmp_path):
    ended = go(2, tmp_path / "run", corpus=corpus, before=other_parameters_on_rank_1)
    assert [each.code for each in ended] == [1, 0], ended
    assert "FAIL: audit: ranks: the parameters on rank 1 are not those on rank 0" in ended[0].out


def slow_clock_on_rank_1(folder: Path, rank: int) -> None:
    def seconds(self, start, end, usual=train.clock.HostClock.seconds):
        return usual(self, start, end) * (1 if rank == 0 else 100)

    train.clock.HostClock.seconds = seconds
    made = SilentReporter.step

    def counted(self, budget, *args):
        made(self, budget, *args)
        (folder / "steps-of-1").write_text(f"{budget.step} {budget.timed_seconds}")

    SilentReporter.step = counted


def test_time_is_up_for_all_at_once(corpus, tmp_path):
    """By rank 0's clock, however slow the others seem to themselves."""
    args = ["--time-budget", "0.5", "--untimed-steps", "2"]
    ended = run_ranks(2, tmp_path / "streams", "--data", str(corpus), "--run-dir", str(tmp_path / "run"), *args,
                      before=partial(slow_clock_on_rank_1, tmp_path))  # fmt: skip
    assert [each.code for each in ended] == [0, 0], ended
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    steps, seconds = (tmp_path / "steps-of-1").read_text().split()
    assert int(steps) == summary["num_steps"] == len(rows(tmp_path / "run")) > 2
    timed = [row["seconds"] for row in rows(tmp_path / "run")][2:]
    assert summary["training_seconds"] == pytest.approx(sum(timed))
    assert float(seconds) < 100 * max(timed) + sum(timed)  # its own last step is the only one that it took itself


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--total-batch-size", "384", "--device-batch-size", "4"],
         "error: 2 ranks cannot share the 3 micro-steps of a step evenly: use --device-batch-size 3, or"
         " --total-batch-size 512\n"),
        (["--repeat", "2"], "error: torchrun starts a single run: leave --repeat and --confirm out,"),
        (["--depht", "2"], "error: "),
        (["--data", "nowhere"], "error: nowhere"),
        (["--ops", "triton"], "error: --ops triton needs a CUDA device"),
    ],
)
def test_bad_input_is_said_once(corpus, tmp_path, args, said):
    data = [] if "--data" in args else ["--data", str(corpus)]
    ended = run_ranks(2, tmp_path / "streams", *data, "--run-dir", str(tmp_path / "run"), *args)
    assert [each.code for each in ended] == [2, 2], ended
    text = "".join(each.err for each in ended)
    assert said in text
    assert text.count("error: ") == 1
    assert "Traceback" not in text
    assert not (tmp_path / "run").exists()


def no_data_on_rank_1(rank: int) -> None:
    def nowhere(*_):
        raise InputError("there is no such folder")

    if rank == 1:
        train.trainer.open_data = nowhere


def test_what_one_rank_alone_cannot_do_ends_all_in_one_line(corpus, tmp_path):
    """Rank 0 makes the folder; rank 1 may be on a machine without the data."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    ended = go(2, tmp_path / "run", corpus=corpus)
    assert [each.code for each in ended] == [2, 2], ended
    line, = lines_of(ended)
    assert "run is not empty: choose another --run-dir (rank 0, on " in line

    ended = go(2, tmp_path / "other", corpus=corpus, before=no_data_on_rank_1)
    assert [each.code for each in ended] == [2, 2], ended
    line, = lines_of(ended)
    assert line.startswith("error: there is no such folder (rank 1, on ")
    assert not (tmp_path / "other").exists()


def test_a_timed_run_on_other_ranks_is_no_single_measurement(corpus, tmp_path):
    folder = tmp_path / "run"
    timed = ["--time-budget", "60", "--untimed-steps", "1", "--data", str(corpus), "--run-dir", str(folder)]
    ended = run_ranks(2, tmp_path / "streams", *timed, before=stop_at(3, 0, signal.SIGTERM))
    assert [each.code for each in ended] == [143, 143], ended
    ended = go(1, folder, before=stop_at(5, 0, signal.SIGTERM))
    assert "timed on 2 and then 1 GPUs or processes, which is no single measurement" in ended[0].out


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"RANK": "x"}, "invalid literal"), ({"MASTER_PORT": None}, "MASTER_PORT"), ({"WORLD_SIZE": None}, "WORLD_SIZE")],
)
def test_half_an_environment_is_bad_input(monkeypatch, capsys, changed, said):
    whole = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
             "MASTER_PORT": "1"}  # fmt: skip
    for name, value in (whole | changed).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    assert train.__main__.main([]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
