"""How often `--eval-every` wants the model to be evaluated: so many steps, or so many seconds of timed training."""

import math
import re
from dataclasses import dataclass

from prepare import InputError
from prepare.words import printable

_SPELLED = re.compile(r"([0-9]{1,12})|([0-9]{1,9}(?:\.[0-9]{1,6})?)s")


@dataclass(frozen=True)
class Every:
    """Of `steps` and `seconds` at most one is not 0; both 0: never."""

    steps: int = 0
    seconds: float = 0.0

    @classmethod
    def of(cls, spelled: str) -> "Every":
        """`100` is steps, `30s` is seconds, `0` is never. Raises InputError."""
        found = _SPELLED.fullmatch(spelled)
        if not found:
            raise InputError(f"--eval-every {printable(spelled)!r} must be steps, as 100, or seconds, as 30s; 0: never")
        return cls(int(found[1] or 0), float(found[2] or 0))

    def __bool__(self) -> bool:
        return bool(self.steps or self.seconds)

    def due(self, step: int, seconds: float, since_step: int, since_seconds: float) -> bool:
        """Whether a multiple lies after the one count, `since`, and up to the other. No counter of its own: a run that
        goes on from its checkpoint asks the same question."""
        if self.steps:
            return step // self.steps > since_step // self.steps
        return bool(self.seconds) and math.floor(seconds / self.seconds) > math.floor(since_seconds / self.seconds)
