"""The budget: seconds of timed training (the product's way), or steps (every comparison that must be exact)."""

from dataclasses import asdict, dataclass


@dataclass
class Budget:
    """Counts steps and the seconds of those that are timed; says how far the run is and when it ends.

    Args:
        seconds: of timed training; no step is sent once they are reached.
        steps: ends after so many steps instead; seconds are then only counted.
        untimed_steps: first steps whose seconds do not count.
    """

    seconds: float
    steps: int | None = None
    untimed_steps: int = 10

    step: int = 0  # steps finished
    timed_steps: int = 0
    timed_seconds: float = 0.0
    untimed_seconds: float = 0.0
    stopped_seconds: float = 0.0  # that the process stood still where seconds count: they are among the timed ones

    def add(self, seconds: float, stopped: float = 0.0) -> None:
        """A step has finished and took so long, and meanwhile the process stood still for a part of it; on a GPU that
        makes one of the next two longer."""
        if self.step + 2 >= self.untimed_steps:
            self.stopped_seconds += stopped
        if self.step < self.untimed_steps:
            self.untimed_seconds += seconds
        else:
            self.timed_seconds += seconds
            self.timed_steps += 1
        self.step += 1

    def counters(self) -> dict[str, float]:
        """What has been counted so far: with the three arguments, all there is."""
        arguments = ("seconds", "steps", "untimed_steps")
        return {name: value for name, value in asdict(self).items() if name not in arguments}

    def progress(self, step: int) -> float:
        """0 to 1, at the beginning of step `step`: what drives the schedules."""
        if self.steps is not None:
            return min(step / self.steps, 1.0)
        return min(self.timed_seconds / self.seconds, 1.0)

    def wants(self, step: int) -> bool:
        """Whether step `step`, counted from 0, is still to be trained."""
        return step < self.steps if self.steps is not None else self.timed_seconds < self.seconds

    @property
    def next_step_counts(self) -> bool:
        """Whether there is one, and its seconds are the budget's."""
        return self.wants(self.step) and self.step >= self.untimed_steps

    @property
    def remaining(self) -> float:
        """Seconds left; by steps, at the mean pace so far."""
        if self.steps is None:
            return max(self.seconds - self.timed_seconds, 0.0)
        elapsed = self.timed_seconds + self.untimed_seconds
        return (self.steps - self.step) * elapsed / self.step if self.step else 0.0

    @property
    def overshoot(self) -> float:
        """Timed seconds past the budget: of the step that reached it, and on a GPU of the one sent meanwhile."""
        return 0.0 if self.steps is not None else max(self.timed_seconds - self.seconds, 0.0)
