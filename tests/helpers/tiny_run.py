"""Runs of a model so small that a step takes milliseconds."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import train.__main__
from train.resilience.checkpoint import checkpoint_folders, read_checkpoint

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


def assert_same(one: Path, other: Path) -> None:
    """Two finished runs, kept checkpoints included: every number of them that is not a time."""
    assert losses(one) == losses(other)
    assert [row["step"] for row in rows(one)] == [*range(len(rows(one)))]
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    summaries = [json.loads((run / "summary.json").read_text()) for run in (one, other)]
    for key in ("val_bpb", "num_steps", "total_tokens_M", "untimed_steps", "fingerprint", "train_cropped_percent"):
        assert summaries[0][key] == summaries[1][key], key
    ends = [read_checkpoint(checkpoint_folders(run / "checkpoints")[0]) for run in (one, other)]
    tensors = [(end.path / "tensors.safetensors").read_bytes() for end in ends]
    assert tensors[0] == tensors[1]
    for key in ("step", "average", "loader"):
        assert ends[0].values[key] == ends[1].values[key], key
