"""How pytest-benchmark is told of times that were taken elsewhere.

It times with the host's clock. It is given one that repeats the times already measured, so that its statistics and its
JSON hold the device's times and no others.
"""

from train.tune.timing import Timing

_now = 0.0


def device_time() -> float:
    """The clock that `replay` moves, for `@pytest.mark.benchmark(timer=device_time)`. Seconds."""
    return _now


def replay(benchmark, timing: Timing) -> None:
    """Gives pytest-benchmark the times already measured. Its timer must be `device_time`."""
    left = iter(timing.seconds)

    def advance():
        global _now
        _now += next(left)

    benchmark.pedantic(advance, rounds=len(timing.seconds))
