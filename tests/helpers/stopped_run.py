"""Runs that a signal ends at a step of the test's choice."""

import os
import signal
from pathlib import Path

import pytest

import train.__main__
from tests.helpers.tiny_run import run_main
from train.results.progress import Reporter

# Without what no run had before there was an option for it.
AS_BEFORE = ["--short-window", "2", "--no-smear", "--bigram-rows", "0", "--bigram-decay", "0", "--no-key-offset"]
STEPS = ["--steps", "16", "--untimed-steps", "3", "--keep-checkpoints", *AS_BEFORE]


def main(*args: str) -> int:
    """Errors of the command line are exits of argparse."""
    try:
        return train.__main__.main([*args])
    except SystemExit as exit:
        return exit.code


def signal_after(monkeypatch, step: int, number: int = signal.SIGTERM) -> None:
    """From here on, runs in this process get a signal while they report `step`."""
    report = Reporter.step

    def reported(self, budget, values, *args, **kwargs):
        report(self, budget, values, *args, **kwargs)
        if values.step == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Reporter, "step", reported)


def interrupt(corpus, folder, *args: str, step: int = 6, number: int = signal.SIGTERM) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        signal_after(patch, step, number)
        assert run_main(corpus, folder, *(args or STEPS)) == 128 + number
    return folder
