"""What a run says: what is about to be trained, one line a step (and the same in metrics.jsonl), the summary."""

import shutil
import sys
from collections.abc import Callable
from typing import TextIO

import torch

import kernels
from model import GPTConfig, flops_per_token
from model.flops import device_peak
from model.gpt import count_parameters
from prepare import Dataset, default_folder
from prepare.words import command_line, printable

from ..budget import Budget
from ..config import TrainConfig, changed_from_recipe
from ..device import gpu_name
from ..resilience.checkpoint import Checkpoint
from ..resilience.durable import DISK_FULL
from ..schedule import StepValues
from .metrics import Value, eval_line, log_line, shown, utilisation
from .run_folder import RunFolder

EPOCHS_WORTH_A_WARNING = 4


class Reporter:
    """Prints the line of each step: redrawn in place on a terminal, one whole line each where redirected."""

    def __init__(
        self, folder: RunFolder, model: GPTConfig, device: torch.device, tokens_per_step: int,
        out: TextIO | None = None, beat: Callable[[], None] = lambda: None, unread: Callable[[], None] = lambda: None,
        gpus: int = 1,
    ):  # fmt: skip
        """`beat` is called after each step, for the watchdog; `unread` where nobody reads what is printed. `gpus`: that
        the run is trained on."""
        self.gpus = gpus
        self.folder, self.model, self.device, self.tokens_per_step = folder, model, device, tokens_per_step
        self.out, self.beat, self.unread = out or sys.stdout, beat, unread
        self.redraw = self.out.isatty()
        self.rows_lost = False

    def step(self, budget: Budget, values: StepValues, dt: float, loss: float, smooth: float, epoch: int) -> None:
        self.beat()
        pace = self.tokens_per_step / dt
        mfu = utilisation(self.model, self.device, pace, self.gpus).mfu
        progress = budget.progress(budget.step)
        line = log_line(
            step=values.step, progress=progress, loss=smooth, lr_multiplier=values.lr_multiplier, dt=dt,
            tokens_per_second=pace, mfu=mfu, epoch=epoch, remaining=budget.remaining,
            # A line that wraps could not be redrawn.
            columns=shutil.get_terminal_size().columns - 1 if self.redraw else None,
        )  # fmt: skip
        row = {
            "step": values.step, "progress": progress, "loss": loss, "smooth_loss": smooth,
            "lr_multiplier": values.lr_multiplier, "momentum": values.momentum,
            "weight_decay": values.weight_decay, "seconds": dt, "timed_seconds": budget.timed_seconds,
            "tokens": budget.step * self.tokens_per_step, "tokens_per_second": pace, "mfu": mfu, "epoch": epoch,
        }  # fmt: skip
        self._log(lambda: self.folder.write_metrics(row), line)

    def evaluated(self, row: dict) -> None:
        """An evaluation on the way, as evals.jsonl has it; its line stays, also where those of steps are redrawn."""
        line = eval_line(row, shutil.get_terminal_size().columns - 1 if self.redraw else None)
        self._log(lambda: self.folder.write_eval(row), line)
        self.end()

    def _log(self, write: Callable[[], None], line: str) -> None:
        try:
            write()  # first: what was printed is in the file
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
            # \r goes to the line's start, \x1b[K clears what a longer one left behind.
            self.out.write(f"\r{line}\x1b[K")
        else:
            self.out.write(line + "\n")
        self.out.flush()

    def end(self) -> None:
        """After the last step: what is printed next begins a line of its own."""
        if self.redraw:
            self.out.write("\n")


class SilentReporter:
    """On a rank other than 0: its steps are the watchdog's alone."""

    def __init__(self, beat: Callable[[], None]):
        self.beat = beat

    def step(self, *_) -> None:
        self.beat()

    def evaluated(self, row: dict) -> None:
        pass

    def end(self) -> None:
        pass


def print_summary(summary: dict[str, Value], out: TextIO | None = None) -> None:
    """`---`, then a `key: value` line each."""
    width = max(map(len, summary)) + 1
    lines = ["---", *(f"{key + ':':<{width}} {shown(key, value)}" for key, value in summary.items())]
    print("\n".join(lines), file=out or sys.stdout, flush=True)


def expected_epochs(config: TrainConfig, model: GPTConfig, tokens: int, ranks: int = 1) -> float:
    """Passes over `tokens` that the run will make: exact by steps, by seconds a guess from the device's usual pace."""
    if config.steps is not None:
        return config.steps * config.total_batch_size / tokens
    if config.device == "cuda":
        flops = 0.4 * (device_peak(torch.cuda.get_device_name()) or 100e12)
    else:
        flops = 25e9 * torch.get_num_threads()
    return ranks * config.time_budget * flops / flops_per_token(model) / tokens


def announce(config: TrainConfig, model: GPTConfig, data: Dataset, folder: RunFolder, ranks: int = 1) -> None:
    """What is about to be trained, on what, in which folder."""
    counts = count_parameters(model)
    kinds = ", ".join(f"{kind} {n / 1e6:.2f}M" for kind, n in counts.items() if kind not in ("total", "scalars"))
    tokens = data.split("train").num_tokens
    threads = torch.get_num_threads()
    cpu = f"cpu, {threads} thread{'s' if threads > 1 else ''}"
    where = gpu_name() if config.device == "cuda" else cpu
    if ranks > 1:
        where = f"{ranks} ranks, each {where}"
    length = f"{config.steps} steps" if config.steps is not None else f"{config.time_budget:g} s"
    print(f"run:    {printable(folder.path)}")
    ops = f"{config.ops} ops"
    if config.ops == "compile":
        ops += f" ({kernels.compiled_attention(torch.device(config.device))})"
    precision = "" if not config.autocast else ", bf16" if config.ops == "cpu" else ", bf16 autocast"
    print(f"device: {where}, {ops}{precision}")
    print(f"data:   {printable(data.source)}, {tokens / 1e6:.1f}M training tokens, vocabulary {data.vocab_size:,}")
    changed = changed_from_recipe(config)
    print(f"recipe: {config.recipe}{', but ' if changed else ''}{' '.join(changed)}")
    print(f"model:  {counts['total'] / 1e6:.2f}M parameters ({kinds})")
    micro = f"{config.grad_accum_steps} micro-step{'s' if config.grad_accum_steps > 1 else ''}"
    print(f"train:  {length}; a step is {config.total_batch_size:,} tokens in {micro}")
    if ranks > 1:
        print(f"ranks:  {ranks}, and each makes {config.grad_accum_steps // ranks} of the micro-steps;"
              f" {same_bits(config, threads)}")  # fmt: skip
    epochs = expected_epochs(config, model, tokens, ranks)
    if epochs > EPOCHS_WORTH_A_WARNING:
        print(
            f"note:   this run will pass over the corpus about {epochs:.0f} times; for a real one:"
            f" {command_line('prepare', '--source', 'climbmix')},"
            f" then {command_line('train', '--data', default_folder('climbmix'))}",
        )
    sys.stdout.flush()


def same_bits(config: TrainConfig, threads: int) -> str:
    """How a run of several ranks is repeated on one, where that is the same run."""
    if config.sums == "native":
        return "--sums native: one alone makes other bits"
    line = command_line("train", "--device-batch-size", config.device_batch_size)
    alone = line if config.device == "cuda" else f"OMP_NUM_THREADS={threads} {line}"
    return f"one alone makes the same bits: {alone}, and the other options as they were"


def announce_resume(checkpoint: Checkpoint, environment: dict, doubts: list[str]) -> None:
    """From where the run goes on, and what may keep it from being the one it would have been, or from counting."""
    timed, then = checkpoint.values["budget"]["timed_seconds"], checkpoint.values["environment"]
    print(f"resume: {checkpoint.step} steps are done, {timed:.1f} s of them timed")
    changed = [f"{key} {then[key]}, now {value}" for key, value in environment.items() if then[key] != value]
    if changed:
        print(f"note:   started with {'; '.join(changed)}: the bits of its numbers may depend on it")
    for doubt in doubts:
        print(f"note:   {doubt}: its number will be compared with no other")
    sys.stdout.flush()
