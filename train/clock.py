"""Marks in time, and whether time went on without the process.

On a GPU the host runs ahead of the device, so there a mark is an event among the work it sends.
"""

import os
import signal
import threading
import time
from time import monotonic, perf_counter
from typing import Any, Protocol

import psutil
import torch


class Clock(Protocol):
    """`lag` is the number of steps that may be on their way while the next one is sent: 0 where sending is doing."""

    lag: int

    def mark(self) -> Any:
        """The moment at which all work sent so far is done."""

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks. Waits for the second."""


class HostClock:
    lag = 0

    def mark(self) -> float:
        return perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start


class DeviceClock:
    """Events on the current stream of the current CUDA device."""

    lag = 1

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def clock_of(device: torch.device | str) -> Clock:
    return DeviceClock() if torch.device(device).type == "cuda" else HostClock()


# Of the process, when this file was imported. Both from the wall clock, which may be set at any later time.
_AGE = max(time.time() - psutil.Process(os.getpid()).create_time(), 0.0)
_IMPORTED = monotonic()


_left_out = 0.0


def leave_out(seconds: float) -> None:
    """So many of the process's are no part of the run, which waited for others."""
    global _left_out
    _left_out += seconds


def seconds_since_start() -> float:
    """Of the process: imports count."""
    return _AGE + monotonic() - _IMPORTED - _left_out


LOOK = 0.1  # seconds from one look at the clock to the next
CONTINUED = getattr(signal, "SIGCONT", None)  # Windows has none, and no process that is stopped
LEAST = 0.5  # seconds of a stop that is worth a word; a thread may have to wait for as long


class Stops:
    """While it is entered: for how long the process stood still, stopped (Ctrl-Z, SIGSTOP) or asleep with its machine.

    SIGCONT says that there was a stop, and the longest time between two looks of a thread how long it was: each proves
    nothing alone, since a signal may find the process running, and a thread may have to wait for Python's lock.
    """

    def __init__(self):
        self._continued = False
        self._looked, self._longest = monotonic(), 0.0
        self._asleep = seconds_asleep()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stops", daemon=True)

    def __enter__(self) -> "Stops":
        if CONTINUED is not None:
            self._before = signal.signal(CONTINUED, self._went_on)
            signal.siginterrupt(CONTINUED, False)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._end.set()
        self._thread.join()
        if CONTINUED is not None:
            signal.signal(CONTINUED, self._before)

    def since(self) -> float:
        """Seconds since the last call that the process stood still. To be called from the main thread, where signals
        are handled."""
        self._look()
        stopped = self._longest if self._continued else 0.0
        self._continued, self._longest = False, 0.0
        before, self._asleep = self._asleep, seconds_asleep()
        return sum((seconds for seconds in (stopped, self._asleep - before) if seconds >= LEAST), 0.0)

    def _went_on(self, *_) -> None:
        self._continued = True

    def _watch(self) -> None:
        while not self._end.wait(LOOK):
            self._look()

    def _look(self) -> None:
        """From two threads: where both see the same stop, it is still one."""
        now = monotonic()
        self._longest = max(self._longest, now - self._looked - LOOK)
        self._looked = now


def seconds_asleep() -> float:
    """That the machine was suspended since it was started; 0 where its clocks do not tell."""
    if not hasattr(time, "CLOCK_BOOTTIME"):
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)
