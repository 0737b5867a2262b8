"""What a run says while it goes: one line a step, and the same in metrics.jsonl."""

import shutil
import sys
from collections.abc import Callable
from typing import TextIO

import torch

from model import GPTConfig

from .budget import Budget
from .files import DISK_FULL
from .metrics import log_line, utilisation
from .runs import RunFolder
from .schedule import StepValues


class Reporter:
    """Prints the line of each step: redrawn in place on a terminal, one whole line each where redirected."""

    def __init__(
        self, folder: RunFolder, model: GPTConfig, device: torch.device, tokens_per_step: int,
        out: TextIO | None = None, beat: Callable[[], None] = lambda: None, unread: Callable[[], None] = lambda: None,
    ):  # fmt: skip
        """`beat` is called after each step (train/watchdog.py), `unread` where nobody reads what is printed."""
        self.folder, self.model, self.device, self.tokens_per_step = folder, model, device, tokens_per_step
        self.out, self.beat, self.unread = out or sys.stdout, beat, unread
        self.redraw = self.out.isatty()
        self.rows_lost = False

    def step(self, budget: Budget, values: StepValues, dt: float, loss: float, smooth: float, epoch: int) -> None:
        self.beat()
        pace = self.tokens_per_step / dt
        mfu = utilisation(self.model, self.device, pace).mfu
        progress = budget.progress(budget.step)
        line = log_line(
            step=values.step, progress=progress, loss=smooth, lr_multiplier=values.lr_multiplier, dt=dt,
            tokens_per_second=pace, mfu=mfu, epoch=epoch, remaining=budget.remaining,
        )  # fmt: skip
        row = {
            "step": values.step, "progress": progress, "loss": loss, "smooth_loss": smooth,
            "lr_multiplier": values.lr_multiplier, "momentum": values.momentum,
            "weight_decay": values.weight_decay, "seconds": dt, "timed_seconds": budget.timed_seconds,
            "tokens": budget.step * self.tokens_per_step, "tokens_per_second": pace, "mfu": mfu, "epoch": epoch,
        }  # fmt: skip
        try:
            self.folder.write_metrics(row)  # first: what was printed is in the file
            self.say(line)
        except BrokenPipeError:
            self.unread()
        except OSError as error:  # a log is no reason to end a run
            if error.errno not in DISK_FULL:
                raise
            if not self.rows_lost:
                print("note: the disk is full: lines are lost, and the run goes on", file=sys.stderr, flush=True)
            self.rows_lost = True

    def say(self, line: str) -> None:
        if self.redraw:
            # A line that wraps could not be redrawn. \r goes to its start, \x1b[K clears what a longer one left behind.
            columns = shutil.get_terminal_size().columns
            self.out.write(f"\r{line[: columns - 1]}\x1b[K")
        else:
            self.out.write(line + "\n")
        self.out.flush()

    def end(self) -> None:
        """After the last step: what is printed next begins a line of its own."""
        if self.redraw:
            self.out.write("\n")


def print_summary(summary: dict[str, str], out: TextIO | None = None) -> None:
    """`---`, then a `key: value` line each."""
    width = max(map(len, summary)) + 1
    lines = ["---", *(f"{key + ':':<{width}} {value}" for key, value in summary.items())]
    print("\n".join(lines), file=out or sys.stdout, flush=True)
