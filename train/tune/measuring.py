"""Candidates checked and timed, on the GPU that will run them.

A candidate is checked twice: on a few tokens against the reference in fp64, and at the step's own size against the
default, in memory that was filled with NaN. What is wrong gets no time. The rest is timed by the GPU's own events with
the L2 overwritten between calls; a first visit drops those that are hopeless, and the others are visited in turn, so
that what drifts drifts for all.
"""

import dataclasses
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch
from torch import Tensor

import kernels
from kernels import Table, Tile, chosen, trying
from model import GPTConfig

from ..config import TrainConfig
from ..step import StepGraphs
from .problems import FUSED, OPS, TRUTHS, assert_close, directions, forward, forward_backward, kind, truth_of
from .steps import make_step
from .targets import DTYPE, Target, call_of, launches_of
from .timing import time_call
from .trials import NO_TIME, Trial, Tuned, one_line

HOPELESS = 1.3  # times the best of the first pass: not timed again
VISITS = 5  # of each of the others, in turn
STEP_VISITS = 5
# ‖difference‖ / ‖value‖ between two tiles: sums in another order are now and then rounded to the neighbouring bf16, and
# a block of layers amplifies that; five iterations in bf16 more so.
TOLERANCE, ITERATES_TOLERANCE = 2.0**-6, 2.0**-4


@contextmanager
def nan_filled() -> Iterator[None]:
    """Inside, memory that nothing was written to yet is NaN: PyTorch fills it where it is to be deterministic."""
    torch.set_deterministic_debug_mode("warn")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode("default")


def difference(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest ‖difference‖ / ‖expected‖; NaN where there is one."""
    worst = []
    for a, b in zip(got, expected, strict=True):
        if a.shape != b.shape:
            return float("nan")
        norm, off = (torch.linalg.vector_norm(x, dtype=torch.float32).item() for x in (b, a - b))
        worst.append(off / norm if norm else off)
    return max(worst, key=lambda error: (error != error, error))  # NaN is larger than any


class Check:
    """What is right, on a few tokens: made once for a target."""

    def __init__(self, target: Target, device: str, dtype: torch.dtype):
        self.target, self.dtype = target, dtype
        self.run = forward_backward if directions(target.op)[-1] == "both" else forward
        self.problem = lambda: truth_of(target.op, device, dtype)
        with kernels.ops_in_force("reference"):
            self.truth = self.run(TRUTHS[kind(target.op)], self.problem()[1])
        on_host = [x.cpu() for x in self.truth]  # which is believed
        self.is_one = all(x.isfinite().all() and x.any() for x in on_host)

    def __call__(self, tile: Tile) -> None:
        """Raises AssertionError where a result is wrong."""
        assert self.is_one, "PyTorch's own result, to compare with, is zero or not finite"
        problem, _ = self.problem()  # a fresh one: an update changes its own
        with trying(self.target.name, self.target.key, tile), nan_filled():
            got = self.run((OPS | FUSED)[kind(self.target.op)], problem)
        assert_close(problem.op, got, self.truth, self.dtype)


def tune(
    tuned: Tuned, device: str, dtype: torch.dtype, seconds: float, about: Callable[[int], None] = lambda number: None
) -> None:
    """Checks and times the trials of a target that nothing speaks against, in about so many seconds.

    A trial that fails leaves its reason behind, and costs the others nothing. `about` is told the number of each before
    it runs: where it breaks the process, it is known which it was.
    """
    until = time.monotonic() + seconds
    target = tuned.target
    check, call = Check(target, device, dtype), call_of(target.op, device, dtype)
    present, *candidates = tuned.trials
    numbers = {id(trial): number for number, trial in enumerate(tuned.trials)}
    if present.fault == NO_TIME:  # it is measured in any case, and compiled where it has to be
        present.fault = None
    about(0)
    expected = None
    with nan_filled():
        launches = launches_of(target, call, present.tile)
    from_kernels = {kernel.__name__ for kernel in target.choice.kernels}
    tuned.whole = not from_kernels or not any(hasattr(again, "kernel") for again in launches.again)
    tuned.launches = target.calls * len(launches.again)
    try:
        check(present.tile)
        expected = launches.outputs
    except Exception as error:
        present.fault = one_line(error)
    del launches

    def visit(trial: Trial, seconds: float = 0.0) -> None:
        about(numbers[id(trial)])
        launches = launches_of(target, call, trial.tile, tuned.whole)
        trial.seconds.append(time_call(launches, device, seconds).median)

    def first_visit(trial: Trial) -> None:
        nonlocal expected
        about(numbers[id(trial)])
        if trial is not present:
            check(trial.tile)
            with nan_filled():
                launches = launches_of(target, call, trial.tile, tuned.whole)
            if expected is None:  # the default is wrong: the first that is right is the measure of the others
                expected = launches.outputs
            trial.error = difference(launches.outputs, expected)
            allowed = ITERATES_TOLERANCE if target.op.module in ("muon", "polar_express") else TOLERANCE
            assert trial.error <= allowed, f"off by {trial.error:.1e} of the default's norm"
            del launches
        visit(trial)

    random.Random(0).shuffle(candidates)  # where time runs out, no corner of the grid is left out as a whole
    for trial in (present, *candidates):
        if trial.fault:
            continue
        if time.monotonic() > until and trial is not present:
            trial.fault = NO_TIME
            continue
        try:
            first_visit(trial)
        except AssertionError as error:
            trial.fault, trial.seconds = f"wrong: {' '.join(str(error).split())[:200]}", []
        except Exception as error:  # of any kind: a launch may fail in many ways
            trial.fault, trial.seconds = one_line(error), []
            _raise_if_lost(device)
    if not tuned.timed:
        return
    best = min(trial.median for trial in tuned.timed)
    left = [trial for trial in tuned.timed if trial is present or trial.median <= HOPELESS * best]
    for trial in left:
        trial.seconds.clear()  # the device was still warming up
    each = max(0.0, until - time.monotonic()) / (VISITS * len(left))
    for _ in range(VISITS):
        for trial in left:
            visit(trial, each)


def _raise_if_lost(device: str) -> None:
    """An illegal access has broken the GPU for this process: whatever follows would fail with it."""
    if device == "cuda":
        torch.cuda.synchronize()


@dataclasses.dataclass
class StepTimes:
    """Of a whole step: seconds of each visit."""

    before: list[float]
    after: list[float]

    @property
    def better(self) -> bool:
        """By more than the one before differs from itself."""
        noise = (max(self.before) - min(self.before)) / median(self.before)
        return median(self.after) < (1 - noise) * median(self.before)

    @property
    def worse(self) -> bool:
        noise = (max(self.before) - min(self.before)) / median(self.before)
        return median(self.after) > (1 + noise) * median(self.before)


class Step:
    """A whole training step of a configuration, to be timed with one table of choices or another."""

    def __init__(self, config: TrainConfig, shape: GPTConfig, device: str, dtype: torch.dtype = DTYPE):
        self.device = device
        config = dataclasses.replace(config, graphs=False)  # a graph would keep the tiles that it was captured with
        self.step, self.batches, self.values = make_step(config, shape, dtype)

    def seconds(self, table: Table, graphs: StepGraphs | None = None) -> float:
        """Of one step with `table` in force, or of the graphs replayed that were captured with it. No parameter
        changes."""
        self.step.graphs = graphs
        with chosen(table):
            self._wait()
            start = time.perf_counter()
            self.step(self.batches, self.values, apply=False)
            self._wait()
            return time.perf_counter() - start

    def loss(self, table: Table) -> float:
        self.step.graphs = None
        with chosen(table):
            return self.step(self.batches, self.values, apply=False)[0].item()

    def captured(self, table: Table) -> StepGraphs:
        with chosen(table):
            return StepGraphs(self.step, self.batches[0].tokens.shape, len(self.batches), self.values)

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def compare_steps(before: Callable[[], float], after: Callable[[], float], visits: int = STEP_VISITS) -> StepTimes:
    """In turn; a first visit to each is not counted."""
    before(), after()
    pairs = [(before(), after()) for _ in range(visits)]
    return StepTimes(*map(list, zip(*pairs, strict=True)))
