"""What came of a target's candidates, which of them is chosen, and how it is told. Times are those of a micro-step."""

from dataclasses import asdict, dataclass, field
from statistics import median

from kernels import Tile

from .targets import Target

NO_TIME = "no time was left"  # the one fault that is none of the candidate's
UNSTEADY = 0.25  # by how much the default's times may differ: where more, something else is at work on the GPU


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def label(tile: Tile) -> str:
    """`128x64x32 w8 s3`: the blocks in the source's order, warps, stages; anything else by its name."""
    blocks = [v for k, v in tile.items() if k.lower().startswith("block") or k == "rows"]
    short = {"num_warps": "w", "num_stages": "s"}
    rest = [f"{short[k]}{v}" for k, v in tile.items() if k in short]
    for key, value in tile.items():
        if not (key.lower().startswith("block") or key == "rows" or key in short or value is False):
            rest.append(key.lower() if value is True else f"{key}={value}")
    return " ".join(["x".join(map(str, blocks)), *rest]).strip()


@dataclass
class Trial:
    """A candidate and what came of it."""

    tile: Tile
    compiled: dict = field(default_factory=dict)
    fault: str | None = None  # why it has no time, or is not to be chosen
    error: float | None = None  # ‖difference‖ / ‖value‖ of the worst result, against the default's
    seconds: list[float] = field(default_factory=list)  # of a call: the median of each visit

    @property
    def median(self) -> float:
        return median(self.seconds)


@dataclass
class Tuned:
    """What came of a target; the default is its first trial."""

    target: Target
    trials: list[Trial]
    whole: bool = False  # timed with all of its op: a step decides
    launches: float = 0.0  # in a micro-step

    @classmethod
    def fresh(cls, target: Target) -> "Tuned":
        return cls(target, [Trial(tile) for tile in target.tiles])

    @property
    def present(self) -> Trial:
        return self.trials[0]

    @property
    def struck(self) -> list[Trial]:
        """What is no use, or wrong."""
        return [trial for trial in self.trials if trial.fault not in (None, NO_TIME)]

    @property
    def untried(self) -> int:
        return sum(trial.fault == NO_TIME for trial in self.trials)

    @property
    def timed(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.seconds and not trial.fault]

    def us(self, trial: Trial) -> float:
        """Microseconds of all its launches in a micro-step."""
        return 1e6 * self.target.calls * trial.median

    @property
    def noise(self) -> float:
        """By how much the default's visits differ, as a share of their median."""
        return (max(self.present.seconds) - min(self.present.seconds)) / self.present.median

    @property
    def unsteady(self) -> bool:
        return bool(self.present.seconds) and self.noise > UNSTEADY

    @property
    def best(self) -> Trial:
        """The default, unless another beats it by more than its own times differ. Where the default is wrong, whatever
        is right and fastest."""
        if not self.timed:
            return self.present
        best = min(self.timed, key=lambda trial: trial.median)
        if self.present.fault or not self.present.seconds:
            return best
        return best if best.median < (1 - self.noise) * self.present.median else self.present

    @property
    def gain(self) -> float:
        """Microseconds of a micro-step; 0 where the default stays, or has no time to be compared with."""
        if self.best is self.present or not self.present.seconds:
            return 0.0
        return self.us(self.present) - self.us(self.best)


HEADER = (
    f"{'kernel':<22}  {'shape':<28}  {'default':<22}  {'µs':>9}  noise  {'best':<22}  {'µs':>9}  {'gain':>8}  timed"
    "  struck  left  spills"
)


def line_of(tuned: Tuned) -> str:
    """Times are of a micro-step; spills, in bytes a thread, are the best one's."""
    target, best, present = tuned.target, tuned.best, tuned.present

    def us(trial: Trial) -> str:
        return f"{tuned.us(trial):,.1f}" if trial.seconds else "-"

    noise = f"{tuned.noise:.1%}" if present.seconds else "-"
    chosen = "-" if best is present else label(best.tile)
    return (
        f"{target.name:<22}  {target.key:<28}  {label(present.tile):<22}  {us(present):>9}  {noise:>5}  {chosen:<22}"
        f"  {us(best):>9}  {tuned.gain:>8,.1f}  {len(tuned.timed):>5}  {len(tuned.struck):>6}  {tuned.untried:>4}"
        f"  {best.compiled.get('stack', '-'):>6}"
    )


def as_json(tuned: Tuned) -> dict:
    """All of it, for a person with a question."""
    return {
        "kernel": tuned.target.name, "shape": tuned.target.key, "op": tuned.target.op.name, "launches": tuned.launches,
        "calls": tuned.target.calls, "trials": [asdict(trial) for trial in tuned.trials],
    }  # fmt: skip
