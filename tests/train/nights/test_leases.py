"""A GPU for each run: no lease is held twice, and none is lost. The GPUs are nothing but a list."""

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

import train.experiment
from prepare import InputError
from tests.helpers.pretend_gpus import pretend_gpus, uuid_of
from tests.helpers.ranks import Ended, fork
from tests.helpers.stopped_run import main, signal_after
from tests.helpers.tiny_run import TINY
from train import clock, leases
from train.config import ROOT
from train.leases import Lease, free, gpus, others_lent, take
from train.resilience import durable
from train.results.ledger import Ledger
from train.results.load import pace_note

# Takes a lease, says so, and ends when a line comes; a process of its own that waits for no import of PyTorch.
HOLDER = """
import os, sys
from train.leases import take
take(sys.argv[1])
print("has", os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
sys.stdin.readline()
"""


def holder(wanted: str = "any") -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", HOLDER, wanted], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def said(process: subprocess.Popen, begin: str) -> str:
    """The rest of the first line that begins so."""
    return next(line.removeprefix(begin).strip() for line in process.stdout if line.startswith(begin))


def starts(count: int, folder: Path, marks: Path, *args: str) -> list[Ended]:
    """`python -m train` so many times in the same second, in processes of their own. Each leaves a mark where it has
    its GPU, and where it is done."""
    return fork(count, folder, partial(started, count, folder, marks, args))


def started(count: int, folder: Path, marks: Path, args: tuple[str, ...], number: int) -> int:
    def mark(what: str) -> None:
        with marks.open("a") as file:
            file.write(f"{what} {os.environ.get('CUDA_VISIBLE_DEVICES')}\n")

    single = train.experiment.single

    def marked(*given) -> int:
        mark("begin")
        try:
            return single(*given)
        finally:
            mark("end")

    train.experiment.single = marked
    leases.LOOK = 0.02
    time.strftime = lambda form, *_: "20261130-000000"
    (folder / f"{number}.ready").touch()
    while len([*folder.glob("*.ready")]) < count:
        time.sleep(0.001)
    return main(*args, "--seed", str(42 + number))


def most_at_once(marks: Path) -> dict[str, int]:
    """By GPU: how many had it at the same time."""
    now, most = {}, {}
    for line in marks.read_text().splitlines():
        what, gpu = line.split()
        now[gpu] = now.get(gpu, 0) + (1 if what == "begin" else -1)
        most[gpu] = max(most.get(gpu, 0), now[gpu])
    assert not any(now.values())
    return most


@pytest.mark.parametrize(("number", "asked"), [(2, ["--gpu", "any"]), (0, [])])
def test_eight_starts_in_one_second(corpus, tmp_path, monkeypatch, number, asked):
    """On two GPUs, each of which one run has at a time; and without asking for any, all eight at once."""
    uuids = pretend_gpus(tmp_path, number, monkeypatch)
    monkeypatch.setenv("TIMEBOX_RUNS", str(tmp_path / "runs"))
    (tmp_path / "ranks").mkdir()
    ended = starts(8, tmp_path / "ranks", tmp_path / "marks", *TINY, "--data", str(corpus), "--steps", "2", *asked)
    assert [each.code for each in ended] == [0] * 8, [each.err for each in ended]
    runs = Ledger(tmp_path / "runs").runs()
    names = {"20261130-000000-run", *(f"20261130-000000-run-{i}" for i in range(2, 9))}
    assert {run["run"] for run in runs} == names
    assert sorted(run["seed"] for run in runs) == [*range(42, 50)]
    assert all((tmp_path / "runs" / name / "summary.json").exists() for name in names)
    if asked:
        assert most_at_once(tmp_path / "marks") == dict.fromkeys(uuids, 1)
        assert {each.out.count("gpu:    all 2 GPUs are lent (") for each in ended} <= {0, 1}


def test_what_is_killed_loses_no_lease(tmp_path, monkeypatch):
    pretend_gpus(tmp_path, 1, monkeypatch)
    first, second = holder(), holder()
    by_pid = {first.pid: first, second.pid: second}
    # Whoever comes second says who has it.
    lines = {}
    threads = [threading.Thread(target=lambda p=p: lines.update({p.pid: p.stdout.readline()})) for p in by_pid.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    has, waits = sorted(by_pid, key=lambda pid: "is lent" in lines[pid])
    assert lines[waits].endswith(f" {has}): waiting, until Ctrl-C\n"), lines
    by_pid[has].kill()
    assert said(by_pid[waits], "has ") == uuid_of(0)
    _, err = by_pid[waits].communicate("\n", timeout=60)
    assert (by_pid[waits].returncode, err) == (0, "")
    assert by_pid[has].wait() == -signal.SIGKILL


def test_one_by_number_or_uuid_and_the_other_stays_free(tmp_path, monkeypatch):
    pretend_gpus(tmp_path, 2, monkeypatch)
    second = holder("1")
    assert said(second, "has ") == uuid_of(1)
    assert free(gpus("1")) is None
    assert free(gpus(uuid_of(1)[:12])) is None
    assert others_lent() == 1
    assert others_lent(uuid_of(1)) == 0
    environment = {}
    take("any", environment)
    assert environment["CUDA_VISIBLE_DEVICES"] == uuid_of(0)
    assert free(gpus("0")) is None
    # What is started from here sees that one alone, and has to wait for it.
    assert [gpu.index for gpu in gpus("any", environment)] == ["0"]
    second.communicate("\n", timeout=60)
    assert others_lent(uuid_of(0)) == 0


def test_ctrl_c_ends_the_wait(corpus, tmp_path, monkeypatch, capsys):
    pretend_gpus(tmp_path, 1, monkeypatch)
    lease = free(gpus("any"))
    asleep = []

    def sleep(seconds):
        asleep.append(seconds)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the signal was to end it")

    monkeypatch.setattr(leases, "sleep", sleep)
    assert main(*TINY, "--data", str(corpus), "--run-dir", str(tmp_path / "run"), "--gpu", "0") == 130
    assert len(asleep) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith("gpu:    GPU 0 is lent (")
    assert captured.err.split() == ["interrupted"]
    assert not (tmp_path / "run").exists()
    lease.give_back()


def test_waiting_is_no_part_of_a_run(tmp_path, monkeypatch):
    pretend_gpus(tmp_path, 1, monkeypatch)
    before = clock.seconds_since_start()
    clock.leave_out(before)
    assert clock.seconds_since_start() < before
    clock.leave_out(-before)
    lease, now = free(gpus("any")), [100.0]
    monkeypatch.setattr(leases, "monotonic", lambda: now[0])

    def sleep(seconds):
        now[0] += 50
        lease.give_back()

    monkeypatch.setattr(leases, "sleep", sleep)
    assert take("any", {}).waited == 50


def test_a_run_sees_its_gpu_alone_and_goes_on_with_the_same_wish(corpus, tmp_path, monkeypatch):
    pretend_gpus(tmp_path, 2, monkeypatch)
    seen = []
    single = train.experiment.single
    monkeypatch.setattr(
        train.experiment, "single",
        lambda config, *rest: seen.append((config.gpu, os.environ["CUDA_VISIBLE_DEVICES"])) or single(config, *rest),
    )  # fmt: skip
    left_out = []
    monkeypatch.setattr(train.experiment, "leave_out", left_out.append)
    taken = free(gpus("0"))
    run = str(tmp_path / "run")
    arguments = [*TINY, "--data", str(corpus), "--steps", "6", "--run-dir", run, "--checkpoint-every", "0"]
    with monkeypatch.context() as patch:
        signal_after(patch, step=2)
        assert main(*arguments, "--gpu", "any") == 143
    leases.held.pop().give_back()  # as the end of the process does
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert main("--resume", run) == 0
    assert seen == [("any", uuid_of(1))] * 2
    assert len(left_out) == 2
    (row,) = Ledger(tmp_path).runs()
    assert row["load"]["other_gpus_lent"] == 1
    assert not any("gpu" in flag for flag in row["flags"])
    taken.give_back()


def test_a_verdict_names_the_neighbours_of_a_slower_run():
    def run(pace: float, lent: int) -> dict:
        return {"budget": "300 s after 10 steps", "summary": {"tokens_per_second": pace},
                "load": {"other_cores": 0.0, "other_gpus_lent": lent}}  # fmt: skip

    assert pace_note(run(80.0, 7), run(100.0, 0)) == (
        "20% fewer tokens a second: other runs had 7 GPUs of the machine, there 0"
    )
    assert pace_note(run(100.0, 0), run(80.0, 7)).endswith(": there other runs had 7 GPUs of the machine")
    assert pace_note(run(95.0, 7), run(100.0, 0)) == ""


@pytest.mark.parametrize(("count", "visible", "wanted", "reason"), [
    (0, None, "any", "--gpu any: nvidia-smi names no GPU (No devices were found): leave --gpu out"),
    (2, "", "any", "--gpu any: CUDA_VISIBLE_DEVICES= leaves no GPU to see"),
    (2, "7", "0", "--gpu 0: CUDA_VISIBLE_DEVICES=7 leaves no GPU to see"),
    (2, None, "2", f"--gpu 2: name one of 0 ({uuid_of(0)}), 1 ({uuid_of(1)}), or any"),
    (2, "1", "0", f"--gpu 0: name one of 1 ({uuid_of(1)}), or any"),
    (2, None, "GPU-", "name one of 0"),
    (2, None, "", "name one of 0"),
    (None, None, "any", "there is no nvidia-smi, so no GPU is known here: leave --gpu out"),
])  # fmt: skip
def test_no_gpu_to_take_is_one_line(corpus, tmp_path, monkeypatch, capsys, count, visible, wanted, reason):
    pretend_gpus(tmp_path, count or 0, monkeypatch)
    if count is None:
        monkeypatch.setenv("PATH", str(tmp_path))
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert main(*TINY, "--data", str(corpus), "--run-dir", str(tmp_path / "run"), "--gpu", wanted) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --gpu")
    assert reason in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("visible", "seen"), [
    ("1", "1"), ("1,0", "1 0"), (" 0 , 0", "0"), ("0,-1,1", "0"), (f"{uuid_of(1)[:12]},0", "1 0"), ("-1", ""),
    ("MIG-5c,1", "MIG-5c 1"), ("G", ""),
])  # fmt: skip
def test_what_is_visible_is_what_cuda_sees(tmp_path, monkeypatch, visible, seen):
    pretend_gpus(tmp_path, 2, monkeypatch)
    if not seen:
        with pytest.raises(InputError, match="leaves no GPU"):
            gpus("any", {"CUDA_VISIBLE_DEVICES": visible})
        return
    assert " ".join(gpu.index for gpu in gpus("any", {"CUDA_VISIBLE_DEVICES": visible})) == seen


def test_torchrun_and_a_lease_are_two_ways(corpus, tmp_path, monkeypatch, capsys):
    pretend_gpus(tmp_path, 2, monkeypatch)
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 1,
                        "MASTER_ADDR": "127.0.0.1"}.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    assert main(*TINY, "--data", str(corpus), "--run-dir", str(tmp_path / "run"), "--gpu", "any") == 2
    reason = "torchrun gives each of its processes a GPU: leave --gpu out, or torchrun"
    assert capsys.readouterr().err == f"error: {reason}\n"


def test_a_disk_without_locks_lends_nothing(corpus, tmp_path, monkeypatch, capsys):
    pretend_gpus(tmp_path, 1, monkeypatch)
    monkeypatch.setattr(durable, "fcntl", None)
    assert main(*TINY, "--data", str(corpus), "--run-dir", str(tmp_path / "run"), "--gpu", "any") == 2
    assert "has no locks (this system has no flock), so no GPU can be lent" in capsys.readouterr().err


def test_a_lease_that_was_given_is_taken_over(tmp_path, monkeypatch):
    """It stays with the process that has it, whoever else closes it."""
    pretend_gpus(tmp_path, 1, monkeypatch)
    lease = free(gpus("any"))
    turn = os.pipe()
    child = subprocess.Popen([sys.executable, "-c", HOLDER, "any"], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, env=os.environ | lease.environment(turn[0]),
                             pass_fds=(lease.descriptor, turn[0]))  # fmt: skip
    assert said(child, "has ") == uuid_of(0)
    lease.give_back()
    assert free(gpus("any")) is None
    assert leases.holders(gpus("any")).endswith(f" {child.pid}")
    child.kill()
    child.wait()
    again = free(gpus("any"))
    assert isinstance(again, Lease)
    again.give_back()
