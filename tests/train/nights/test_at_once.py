"""--repeat and --confirm on several GPUs: what runs at once is judged as if it had run one by one, and ends together.

Most runs here are forked from the test: they take a lease, are told their turn and write a row as a run does, and train
nothing. Where one is to end after another, it waits for that one's mark, and not for a time.
"""

import gc
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

import train.experiment
from tests.helpers.ledger_entries import add, entry
from tests.helpers.pretend_gpus import pretend_gpus
from tests.helpers.stopped_run import main
from tests.helpers.tiny_run import TINY
from train import at_once, leases
from train.config import TrainConfig, parse_given
from train.leases import NOT_NEEDED, free, gpus, take
from train.results.judge import NOT_NEEDED_NOTE
from train.results.ledger import Ledger
from train.results.provenance import machine


class Forked:
    """In place of Popen: `work` of the command's configuration, in a fork of this process that has the descriptors that
    a process started by that would have."""

    def __init__(self, work, command, *, env=None, pass_fds=(), stdout=None, process_group=None, **_):
        sys.stdout.flush()
        signals = (signal.SIGINT, signal.SIGTERM)
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        self.pid = os.fork()
        self.code = None
        if self.pid:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
            return
        code = 1
        gc.freeze()  # what is left of earlier tests is not this process's to end
        try:
            os.setpgid(0, 0)
            if stdout is not None:
                os.dup2(stdout.fileno(), 1)
                os.dup2(stdout.fileno(), 2)
            for descriptor in set(range(3, 100)) - set(pass_fds):
                try:
                    os.close(descriptor)
                except OSError:
                    continue
            for number in signals:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
            os.environ.update(env or {})
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
            code = work(TrainConfig(**parse_given(command[3:])))
            sys.stdout.flush()
        finally:
            os._exit(code)

    def poll(self):
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self):
        while self.poll() is None:
            time.sleep(0.002)
        return self.code

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)


class Night:
    """Runs that train nothing. `numbers`: what a group has, by seed; `after`: whose mark a seed waits for before it is
    trained; `fails`: which seed ends with which code."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch):
        self.folder = folder
        self.numbers: dict[str, dict[int, float]] = {}
        self.after: dict[int, list[int]] = {}
        self.fails: dict[int, int] = {}
        patch.setattr(at_once, "POLL", 0.005)
        patch.setattr(train.experiment, "Popen", lambda *args, **more: Forked(self.run, *args, **more))
        patch.setattr(at_once, "Popen", lambda *args, **more: Forked(self.run, *args, **more))

    def mark(self, seed: int) -> Path:
        return self.folder / f"{seed}.trained"

    def run(self, config: TrainConfig) -> int:
        gpu = take(config.gpu)
        with (self.folder / "marks").open("a", buffering=1) as marks:
            marks.write(f"begin {os.environ.get('CUDA_VISIBLE_DEVICES')} {config.seed}\n")
            print(f"this is seed {config.seed}", flush=True)
            while not all(self.mark(other).exists() for other in self.after.get(config.seed, [])):
                time.sleep(0.002)
            self.mark(config.seed).touch()
            if code := self.fails.get(config.seed):
                print(f"FAIL: seed {config.seed}", flush=True)
                return code
            needed = gpu.turn.wait(lambda: None) if gpu.turn else True
            name = Path(config.run_dir).name
            made = entry(name, self.numbers[config.group][config.seed], group=config.group, seed=config.seed)
            made["comparable"] |= {"machine": machine("cpu")["name"], "budget": "3 steps"}
            made["config"] = {"max_seeds": config.max_seeds}
            made["doubts"] = [] if needed else [NOT_NEEDED_NOTE]
            add(Ledger(self.folder), made)
            marks.write(f"end {os.environ.get('CUDA_VISIBLE_DEVICES')} {config.seed}\n")
        return 0

    def main(self, name: str, numbers: dict[int, float], *more: str) -> int:
        self.numbers[name] = numbers
        for mark in self.folder.glob("*.trained"):
            mark.unlink()
        return main("--steps", "3", "--device", "cpu", "--run-dir", str(self.folder / name), *more)

    def rows(self) -> list[dict]:
        return Ledger(self.folder).runs()


@pytest.fixture
def night(tmp_path, monkeypatch):
    (tmp_path / "night").mkdir()
    return Night(tmp_path / "night", monkeypatch)


def test_repeats_that_end_in_any_order_are_judged_in_the_order_of_their_seeds(night, tmp_path, monkeypatch, capsys):
    pretend_gpus(tmp_path, 3, monkeypatch)
    night.after = {42: [43], 43: [44]}
    assert night.main("base", {seed: 1.0 + seed / 1e4 for seed in range(42, 47)}, "--repeat", "5", "--gpu", "any") == 0
    assert [row["seed"] for row in night.rows()] == [42, 43, 44, 45, 46]
    now, most = set(), 0
    for line in (night.folder / "marks").read_text().splitlines():
        what, gpu, _ = line.split()
        assert (what == "end") == (gpu in now), "a GPU has one run at a time"
        now ^= {gpu}
        most = max(most, len(now))
    assert (now, most) == (set(), 3)
    out = capsys.readouterr().out
    assert "=== repeat of base: seed 44 on GPU 2, output in " in out
    assert "=== seed 46: val_bpb 1.004600, baseline\n" in out
    assert re.search(r"^val_bpb:   1\.004400 ± \d\.\d{6} \(5\)$", out, re.MULTILINE)
    assert (night.folder / "base-seed43.log").read_text().endswith("this is seed 43\n")


# By group: what each seed would give. The baseline has 42, 43, 44, of which 44 is compared first.
NIGHT = {
    "worse": {44: 1.02, 43: 0.90, 42: 0.90},
    "luck": {44: 0.992, 43: 1.004, 42: 0.9},
    "slow": {44: 0.9965, 43: 1.0015, 42: 0.996},
    "gain": {44: 0.985, 43: 0.984, 42: 0.986, 45: 0.986},
}


def a_night(folder: Path, asked: list[str], more: dict[int, list[int]]) -> list[dict]:
    with pytest.MonkeyPatch.context() as patch:
        folder.mkdir()
        night = Night(folder, patch)
        assert night.main("base", {42: 1.000, 43: 1.004, 44: 0.996}, "--repeat", "3", *asked) == 0
        night.after = more
        for name, numbers in NIGHT.items():
            assert night.main(name, numbers, "--confirm", *asked) == 0, name
        return night.rows()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_confirmation_decides_as_it_would_one_by_one(tmp_path, monkeypatch, capsys, count):
    """Verdicts and their notes, p and noise and all, where the seeds behind those that decide end first."""
    one_by_one = a_night(tmp_path / "one", [], {})
    said_one = [line for line in capsys.readouterr().out.splitlines() if line.startswith("verdict:")]
    pretend_gpus(tmp_path, count, monkeypatch)
    more = {44: [43, 42][: count - 1], 43: [42][: count - 2]} if count > 1 else {}
    rows = a_night(tmp_path / "many", ["--gpu", "any"], more)
    said_many = [line for line in capsys.readouterr().out.splitlines() if line.startswith("verdict:")]
    judged = [row for row in rows if row["verdict"] != "not needed"]
    keys = ("group", "seed", "status", "verdict", "note")
    *theirs, fresh = [[row[key] for key in keys] for row in one_by_one]
    *ours, ours_fresh = [[row[key] for key in keys] for row in judged]
    assert ours == theirs
    assert said_many == said_one
    assert (fresh[1], ours_fresh[1]) == (45, 42 if count == 4 else 45)
    assert ours_fresh[2:4] == fresh[2:4] == ["keep", "incumbent"]
    beside = [row for row in rows if row["verdict"] == "not needed"]
    assert {row["seed"] for row in beside if row["group"] == "worse"} == {1: set(), 2: {43}, 4: {43, 42}}[count]
    assert all(row["status"] == "discard" for row in beside)


def test_the_first_that_fails_ends_the_others(night, tmp_path, monkeypatch, capsys):
    """Its GPU is free a moment before it is known how it ended, and nothing begins there any more."""
    pretend_gpus(tmp_path, 3, monkeypatch)

    def once_free(among):
        while (lease := free(among)) is None:
            time.sleep(0.002)
        return lease

    monkeypatch.setattr(at_once, "free", once_free)
    night.after, night.fails = {42: [99], 43: [44]}, {43: 1}  # of these no other ends by itself
    assert night.main("base", {}, "--repeat", "5", "--gpu", "any") == 1
    assert night.rows() == []
    out = capsys.readouterr().out
    assert "seed 43 | FAIL: seed 43\n=== seed 43 ended with 1\n" in out
    assert "=== seed 42 ended with 143\n" in out
    assert "=== seed 44 ended with 143\n" in out
    assert "seed 45" not in out
    assert "verdict:" not in out
    assert leases.others_lent() == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_all(night, tmp_path, monkeypatch, capfd, number, code):
    pretend_gpus(tmp_path, 2, monkeypatch)
    night.after = {42: [99], 43: [99]}
    start = at_once.AtOnce._start

    def started(self, seed, *rest):
        start(self, seed, *rest)
        if seed == 43:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(at_once.AtOnce, "_start", started)
    assert night.main("base", {}, "--repeat", "4", "--gpu", "any") == code
    captured = capfd.readouterr()
    assert "2 runs finish their steps; a second signal stops at once" in captured.err
    assert captured.out.count(f" ended with {code}\n") == 2
    assert "seed 44" not in captured.out
    assert leases.others_lent() == 0


def test_a_signal_ends_the_wait_for_the_first_gpu(night, tmp_path, monkeypatch, capsys):
    pretend_gpus(tmp_path, 1, monkeypatch)
    taken = free(gpus("any"))
    monkeypatch.setattr(at_once, "sleep", lambda seconds: os.kill(os.getpid(), signal.SIGINT))
    assert night.main("base", {}, "--confirm", "--gpu", "any") == 130
    assert "=== all GPUs are lent (" in capsys.readouterr().out
    assert not (night.folder / "marks").exists()
    taken.give_back()


def test_one_gpu_by_its_number_takes_them_one_by_one(night, tmp_path, monkeypatch, capsys):
    pretend_gpus(tmp_path, 2, monkeypatch)
    assert night.main("base", {42: 1.0, 43: 1.1}, "--repeat", "2", "--gpu", "1") == 0
    assert [row["seed"] for row in night.rows()] == [42, 43]
    assert len(set(re.findall(r"begin (\S+)", (night.folder / "marks").read_text()))) == 1


def test_no_gpu_is_one_line(night, tmp_path, monkeypatch, capsys):
    pretend_gpus(tmp_path, 0, monkeypatch)
    assert night.main("base", {}, "--repeat", "2", "--gpu", "any") == 2
    assert capsys.readouterr().err.startswith("error: --gpu any: nvidia-smi names no GPU")
    assert [*night.folder.iterdir()] == []


@pytest.mark.parametrize(("word", "verdict"), [(NOT_NEEDED, "not needed"), (b"", "baseline")])
def test_a_run_is_judged_when_it_is_told(corpus, tmp_path, monkeypatch, word, verdict):
    """Where whoever would tell it is gone, it goes on by itself."""
    pretend_gpus(tmp_path, 1, monkeypatch)
    heard, told = os.pipe()
    os.write(told, word)
    os.close(told)
    for name, value in free(gpus("any")).environment(heard).items():
        monkeypatch.setenv(name, value)
    run = tmp_path / "run"
    assert main(*TINY, "--data", str(corpus), "--run-dir", str(run), "--steps", "2", "--gpu", "any") == 0
    (row,) = Ledger(tmp_path).runs()
    assert (row["verdict"], row["audit"]) == (verdict, "ok")
    assert row["val_bpb"] == json.loads((run / "summary.json").read_text())["val_bpb"]
    os.close(heard)


def test_repeats_from_end_to_end(corpus, tmp_path, monkeypatch, capsys):
    pretend_gpus(tmp_path, 2, monkeypatch)
    arguments = [*TINY, "--data", str(corpus), "--steps", "2", "--run-dir", str(tmp_path / "base")]
    assert main(*arguments, "--repeat", "2", "--gpu", "any") == 0
    assert [(row["seed"], row["verdict"]) for row in Ledger(tmp_path).runs()] == [(42, "baseline"), (43, "baseline")]
    log = (tmp_path / "base-seed43.log").read_text()
    assert "gpu:    1, Pretended, of one kind (GPU-00000001-" in log
    assert "verdict:" in log
    assert "status:    keep" in capsys.readouterr().out
