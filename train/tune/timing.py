"""How long a call takes on its device.

On a GPU the time is between two events on the stream, not on the host's clock. Before each call a buffer of several
times the L2 is overwritten: no input is found in the cache, and while that runs the host gets ahead, so that launching
is not timed. A call whose launches take the host longer than its kernels take the GPU is recorded as a graph and
replayed. The median of many calls counts.
"""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from statistics import median, quantiles

import torch

SECONDS = 0.25  # of calls to time, about
ROUNDS = (5, 100)  # at least and at most
WARM_UP = 3
LAUNCHES = 0.7  # of a call's time on the GPU: where launching takes longer, it may be all that is measured


@dataclass(frozen=True)
class Timing:
    """The seconds of each call, in order, and how they were taken: "events", "graph" or "host clock"."""

    seconds: list[float]
    method: str

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def spread(self) -> float:
        """The middle four fifths of the times, as a share of the median."""
        deciles = quantiles(self.seconds, n=10)
        return (deciles[-1] - deciles[0]) / self.median


def time_call(call: Callable[[], object], device: str, seconds: float = SECONDS) -> Timing:
    """Times `call` on "cuda" or "cpu", after warming it up: calls of about so many seconds in all."""
    for _ in range(WARM_UP):
        call()
    return _time_on_gpu(call, seconds) if device == "cuda" else _time_on_host(call, seconds)


def _rounds(once: float, seconds: float) -> int:
    least, most = ROUNDS
    return max(least, min(most, int(seconds / max(once, 1e-9))))


def _time_on_host(call: Callable[[], object], seconds: float = SECONDS) -> Timing:
    def once() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return Timing([once() for _ in range(_rounds(once(), seconds))], "host clock")


def time_synchronised(call: Callable[[], object], device: str) -> Timing:
    """Times a long `call` by the host's clock, the device idle before and after it: its launch gaps count."""

    def once():
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    for _ in range(WARM_UP):
        once()
    return _time_on_host(once)


@cache
def _flush_buffer() -> torch.Tensor:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return torch.empty(4 * properties.L2_cache_size, dtype=torch.int8, device="cuda")


def _event_times(call: Callable[[], object], rounds: int) -> list[float]:
    flush = _flush_buffer()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start, end in pairs:
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def _captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph | None:
    """The call as a graph, None where it waits for the device and so cannot be one.

    That is found out before the capture: one that fails leaves allocator and generator of PyTorch 2.11 in the belief
    that it goes on (the allocator's is mended by pytorch/pytorch #180395), and what follows in the process fails.
    """
    side, waits = torch.cuda.Stream(), False
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # on a stream of its own first, as capture asks
        with warnings.catch_warnings(action="ignore"):  # PyTorch's, that the mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError:
            waits = True
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    if waits:
        return None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        call()
    return graph


def _time_on_gpu(call: Callable[[], object], seconds: float) -> Timing:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    host = time.perf_counter() - start
    first = median(_event_times(call, 3))
    # Where launches bound it, the two are the same but for noise and the head start that the overwriting gives.
    bound = host > LAUNCHES * first
    if bound and (graph := _captured(call)) is not None:
        return Timing(_event_times(graph.replay, _rounds(first, seconds)), "graph")
    return Timing(_event_times(call, _rounds(first, seconds)), "events, bound by launches" if bound else "events")
