"""Watches that steps go on: says where a run hangs, and ends one that hangs for long."""

import faulthandler
import os
import select
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from statistics import median
from time import monotonic
from typing import ParamSpec, TypeVar

P, T = ParamSpec("P"), TypeVar("T")

FLOOR = 30.0  # seconds without a step that are never worth a word: a checkpoint
ALARM = 10  # times the usual step
RECENT = 32  # steps that say what is usual
POLL = 1.0  # seconds between two looks
GRACE = 60.0  # seconds beyond the end that the process is given where even the watchdog's own thread cannot run
LAST_WORDS = 10.0  # seconds for what is done at the end: the disk that it needs may be what hangs


class HangError(Exception):
    """A run that made no step for long."""


class Watchdog:
    """A thread that looks once a second whether `beat` was called, after a step or a batch of the evaluation.

    Where no beat comes for ten times what is usual among the recent ones, at least `FLOOR` seconds, it prints where
    every thread stands, once a hang. Where none comes for `hang_timeout` seconds (and ten times the usual step, if that
    is more) it prints FAIL, how to go on, and ends the process with exit code 1, wherever its other threads are stuck.
    What is on disk stays: files are written beside and renamed, logs flushed a line at a time.

    Nothing is usual yet where another `phase` begins, nor before a function that it is `watching` was given arguments
    of these shapes: what is made once, kernels above all, takes its time. Until the second beat from there only the end
    counts.

    Seconds are counted while the process runs: stopped (Ctrl-Z) or suspended, it does not hang. One that is stuck in C
    code and never gives Python's lock back is ended by `faulthandler`, `GRACE` seconds later, with the same code; its
    clock goes on while the process is stopped, so a stop longer than both together may end the run too.

    Args:
        hang_timeout: seconds; 0 watches nothing.
        at_the_end: is given the reason, and `LAST_WORDS` seconds in a thread of its own; returns how to go on, or None
            where another process of the run says so.
    """

    def __init__(self, hang_timeout: float, at_the_end: Callable[[HangError], str | None] = lambda reason: ""):
        self.hang_timeout, self.at_the_end = hang_timeout, at_the_end
        self._beats = 0
        self._last: float | None = None  # the last beat of this phase
        self._slowest = 0.0  # what was usual in the slowest phase before
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self.hang_timeout:
            self._arm(self.hang_timeout)
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        if self.hang_timeout:
            self._thread.join()

    def retire(self) -> None:
        """Nothing more is watched."""
        self._stop.set()

    def beat(self) -> None:
        """A step has finished."""
        now = monotonic()
        if self._last is not None:
            self._recent.append(now - self._last)
        self._last = now
        self._beats += 1

    def phase(self) -> None:
        """Something else begins: what was usual says nothing of how long it takes, but for how slow this machine is."""
        self._slowest = max(self._slowest, self._usual())
        self._recent.clear()
        self._last = None
        self._beats += 1

    def watching(self, function: Callable[P, T]) -> Callable[P, T]:
        """`function` of tensors, with a beat after each call; a call with new shapes begins a phase."""
        seen = set()

        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            shapes = tuple(tensor.shape for tensor in args)
            if shapes not in seen:
                seen.add(shapes)
                self.phase()
            result = function(*args, **kwargs)
            self.beat()
            return result

        return call

    def limits(self) -> tuple[float, float]:
        """Seconds without a beat after which the threads are shown, and after which the run is ended."""
        usual = self._usual()
        end = max(self.hang_timeout, ALARM * usual, ALARM * self._slowest)
        return (min(max(ALARM * usual, FLOOR), end) if usual else end), end

    def _usual(self) -> float:
        """Seconds from beat to beat in this phase; 0 before the second."""
        recent = list(self._recent)
        return median(recent) if recent else 0.0

    def _arm(self, end: float) -> None:
        """From C, which needs no lock of Python's; put off at every look, and so reached only where there is none."""
        faulthandler.dump_traceback_later(min(end + GRACE, 1e6), exit=True, file=2)

    def _watch(self) -> None:
        seen, waited, told, before = self._beats, 0.0, False, monotonic()
        try:
            while not self._stop.wait(min(POLL, self.hang_timeout / 4)):
                now = monotonic()
                # Not the whole of a longer gap: the process was stopped, or this thread had to wait as well.
                waited, before = waited + min(now - before, 2 * POLL), now
                if self._beats != seen:
                    seen, waited, told = self._beats, 0.0, False
                show, end = self.limits()
                self._arm(end)
                if waited >= show and not told:
                    told = True
                    write(2, f"\nno step for {waited:.0f} s; this is where every thread stands:\n{threads()}")
                if waited >= end:
                    self._end(HangError(f"no step for {waited:.0f} s"))
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _end(self, reason: HangError) -> None:
        advice = []
        words = threading.Thread(target=lambda: advice.append(self.at_the_end(reason)), daemon=True)
        words.start()
        words.join(LAST_WORDS)
        if advice != [None]:
            write(1, f"\nFAIL: {'; '.join([str(reason), *filter(None, advice)])}\n")
        os._exit(1)


def threads() -> str:
    """Where every thread of Python's stands, the innermost frame last; for one that is in C code, who called it. No
    file is read for it: a file system may be what hangs."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = []
    for ident, frame in sys._current_frames().items():
        if ident != threading.get_ident():
            lines.append(f"thread {names.get(ident, ident)}:")
            stack = reversed([*traceback.walk_stack(frame)])
            lines += [f"  {f.f_code.co_filename}:{number} in {f.f_code.co_qualname}" for f, number in stack]
    return "\n".join(lines) + "\n"


def write(fd: int, text: str) -> None:
    """Past Python's buffers, whose locks a stuck thread may hold; gives up where nobody reads for five seconds."""
    data = text.encode(errors="backslashreplace")
    while data and select.select([], [fd], [], 5.0)[1]:
        data = data[os.write(fd, data[: select.PIPE_BUF]) :]
