"""Marks in time. On a GPU the host runs ahead of the device, so there a mark is an event among the work it sends."""

import os
import time
from time import perf_counter
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


def seconds_since_start() -> float:
    """Of the process: imports count."""
    return time.time() - psutil.Process(os.getpid()).create_time()
