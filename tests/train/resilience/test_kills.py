"""A run that is killed again and again ends as one that was left alone: bit for bit, on the CPU, by steps.

Kills are of real processes. `TIMEBOX_KILLS=50 pytest tests/train/resilience/test_kills.py` makes as many as it says.
"""

import json
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import train.__main__
from tests.helpers.tiny_run import TINY, assert_same, run_main, start
from train.resilience.checkpoint import checkpoint_folders, read_checkpoint
from train.results.ledger import Ledger

KILLS = int(os.environ.get("TIMEBOX_KILLS", "4"))


def kill(process, rng: random.Random, folder: Path, how: str) -> int:
    """Kills it at a random moment: at any time, of which most is setting up; after some steps; while a checkpoint is
    being written. Returns its exit code."""
    timer = threading.Timer(rng.uniform(0, 4), process.kill)
    if how == "any time":
        timer.start()
    last = next_step(folder) + rng.randint(0, 9)
    for line in process.stdout:
        if line.startswith(f"step {last:05d}"):
            break
    timer.cancel()
    time.sleep(rng.uniform(0, 0.02))
    while how == "while it writes" and process.poll() is None:
        process.send_signal(signal.SIGSTOP)  # so that what is seen is still so when it is killed
        if parts(folder):
            break
        process.send_signal(signal.SIGCONT)
        time.sleep(rng.uniform(0, 0.005))
    process.kill()
    process.communicate()
    return process.returncode


def parts(folder: Path) -> set[tuple[str, int]]:
    """Checkpoints begun and not finished."""
    return {(path.name, path.stat().st_ino) for path in (folder / "checkpoints").glob("*.part")}


def next_step(folder: Path) -> int:
    checkpoints = checkpoint_folders(folder / "checkpoints")
    return read_checkpoint(checkpoints[0]).step if checkpoints else 0


def test_killed_at_random_moments(corpus, tmp_path):
    rng = random.Random(3)
    args = [*TINY, "--data", str(corpus), "--steps", str(40 * KILLS), "--keep-checkpoints", "--checkpoint-every", "0"]
    undisturbed = start(*args, "--run-dir", str(tmp_path / "whole"))
    folder = tmp_path / "run"
    torn = 0
    for number in range(KILLS):
        resumable = bool(checkpoint_folders(folder / "checkpoints"))
        if not resumable:  # killed before its first checkpoint
            shutil.rmtree(folder, ignore_errors=True)
        before = parts(folder)
        process = start("--resume", str(folder)) if resumable else start(*args, "--run-dir", str(folder))
        how = ["while it writes", "after some steps", "any time"][number % 3]
        assert kill(process, rng, folder, how) == -signal.SIGKILL
        torn += bool(parts(folder) - before)
    last = start("--resume", str(folder))
    _, err = last.communicate(timeout=600)
    assert last.returncode == 0, err
    _, err = undisturbed.communicate(timeout=600)
    assert undisturbed.returncode == 0, err
    assert torn >= (KILLS + 2) // 3
    assert_same(folder, tmp_path / "whole")
    print(f"{KILLS} of {KILLS} kills survived, {torn} of them while a checkpoint was being written")


def test_killed_between_its_row_and_its_summary(corpus, tmp_path):
    """It comes to its end a second time, and is judged as it was: not as two runs."""
    for seed in ("1", "2"):
        folder = tmp_path / f"seed-{seed}"
        assert run_main(corpus, folder, "--steps", "3", "--keep-checkpoints", "--seed", seed) == 0
    summary = folder / "summary.json"
    first = json.loads(summary.read_text())
    assert first["verdict"].startswith("undecided: next seed 1 (against seed-1; nothing is known of the noise")
    summary.unlink()
    assert train.__main__.main(["--resume", str(folder)]) == 0
    again = json.loads(summary.read_text())
    assert [again[key] for key in ("status", "verdict")] == [first[key] for key in ("status", "verdict")]
    assert len(Ledger.beside(folder).runs()) == 2
