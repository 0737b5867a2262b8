"""Runs of a model so small that a step takes milliseconds."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import train.__main__

TINY = [
    "--device", "cpu", "--depth", "2", "--d-model", "64", "--head-dim", "16", "--seq-len", "32",
    "--device-batch-size", "4", "--total-batch-size", "256", "--no-autocast",
]  # fmt: skip


def run_main(corpus, folder, *args: str) -> int:
    """In this process."""
    return train.__main__.main([*TINY, "--data", str(corpus), "--run-dir", str(folder), *args])


def start(*args: str) -> subprocess.Popen:
    """In a process of its own, with one thread: several of them leave room for each other."""
    return subprocess.Popen(
        [sys.executable, "-m", "train", *args],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A shell has SIGINT ignored in what it runs in the background, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder)]
