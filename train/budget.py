"""The stopwatch. By seconds (the product's way), or by steps (every comparison that must be exact)."""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter


@dataclass
class Budget:
    """Counts steps and the seconds of those that are timed; says how far the run is and when it ends.

    Args:
        seconds: of timed training; the run ends with the first step at whose end they are reached.
        steps: ends after so many steps instead; seconds are then only counted.
        untimed_steps: first steps whose seconds do not count.
        clock: returns seconds; a test brings its own.
    """

    seconds: float
    steps: int | None = None
    untimed_steps: int = 10
    clock: Callable[[], float] = perf_counter

    def __post_init__(self):
        self.step = 0  # steps finished
        self.timed_seconds = 0.0
        self.untimed_seconds = 0.0
        self.timed_steps = 0

    def start(self) -> None:
        """The next step begins now."""
        self._started = self.clock()

    def stop(self) -> float:
        """The step has ended. Returns its seconds."""
        dt = self.clock() - self._started
        if self.step < self.untimed_steps:
            self.untimed_seconds += dt
        else:
            self.timed_seconds += dt
            self.timed_steps += 1
        self.step += 1
        return dt

    @property
    def progress(self) -> float:
        """0 to 1: what drives the schedules."""
        if self.steps is not None:
            return min(self.step / self.steps, 1.0)
        return min(self.timed_seconds / self.seconds, 1.0)

    @property
    def done(self) -> bool:
        return self.step >= self.steps if self.steps is not None else self.timed_seconds >= self.seconds

    @property
    def remaining(self) -> float:
        """Seconds left; by steps, at the mean pace so far."""
        if self.steps is None:
            return max(self.seconds - self.timed_seconds, 0.0)
        elapsed = self.timed_seconds + self.untimed_seconds
        return (self.steps - self.step) * elapsed / self.step if self.step else 0.0
