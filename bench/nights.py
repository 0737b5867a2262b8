"""What rules of keeping and discarding make of whole nights: `python -m bench.nights [--nights 1000]`.

A night is 120 runs. Of the ideas half change nothing, two fifths are worse and a tenth is better, uniformly up to 3 σ,
where σ is what a run's number varies by. Two runs on one seed are correlated by ρ; a machine may drift by 2 σ over the
night, one way or the other. An idea that is kept changes the level of all that come after it. The rules:

    lower     keep what is lower than the lowest number kept, one run each: the published system's
    7ac71bc   as this program did at that commit: a number below the luckiest of all is run on three fresh seeds, and
              kept where Welch's test calls these better than the incumbent's
    seeds     as it does now (`train.results.statistics`, `train.results.judge`), with the incumbent run once more on a
              fresh seed when it is kept, and whenever twelve experiments have come since

σ_d is the standard deviation of a difference on one seed, σ·√(2(1 − ρ)). Printed are the share of gains of √2·σ_d and
more that are kept; the share of experiments without a gain that are kept; the share of those among all that are kept;
runs an experiment, all included; and the true gain of a night, in σ.
"""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import fmean

from prepare.arguments import Parser, command
from train.results.judge import REFRESH, next_seed
from train.results.statistics import BETTER, UNDECIDED, decide, noise_of, welch_p

RUNS = 120
CORRELATIONS, DRIFTS = (0.0, 0.5, 0.8), (0.0, 2.0)


class NightIsOverError(Exception):
    pass


@dataclass
class Night:
    """Runs until there are no more; what each experiment truly was."""

    random: random.Random
    correlation: float
    drift: float  # of all runs, in σ
    level: float = 0.0  # of the code that is kept
    runs: int = 0
    experiments: list[tuple[float, bool]] = field(default_factory=list)  # true change, kept
    seeds: dict[int, float] = field(default_factory=dict)

    def run(self, level: float, seed: int) -> float:
        if self.runs == RUNS:
            raise NightIsOverError
        of_the_seed = self.seeds.setdefault(seed, self.random.gauss(0, 1))
        own = self.random.gauss(0, 1)
        drifted = self.drift * self.runs / RUNS
        self.runs += 1
        return level + math.sqrt(self.correlation) * of_the_seed + math.sqrt(1 - self.correlation) * own + drifted

    def ideas(self) -> Iterator[float]:
        """How each would change the level."""
        while True:
            kind, size = self.random.random(), self.random.uniform(0, 3)
            yield 0.0 if kind < 0.5 else size if kind < 0.9 else -size

    def tried(self, change: float, kept: bool) -> None:
        self.experiments.append((change, kept))
        self.level += change * kept


def lower(night: Night) -> None:
    best = night.run(0.0, 42)
    for change in night.ideas():
        value = night.run(night.level + change, 42)
        night.tried(change, value < best)
        best = min(best, value)


def as_at_7ac71bc(night: Night) -> None:
    theirs = [night.run(0.0, seed) for seed in (42, 43, 44)]
    luckiest = min(theirs)
    for change in night.ideas():
        level, kept = night.level + change, False
        value = night.run(level, 42)
        if value < luckiest:
            fresh = [night.run(level, seed) for seed in (43, 44, 45)]
            kept = fmean(fresh) < fmean(theirs) and welch_p(fresh, theirs) < 0.05
            luckiest = min(luckiest, value, *fresh)
            theirs = fresh if kept else theirs
        night.tried(change, kept)


def by_seeds(night: Night) -> None:
    theirs = {seed: night.run(0.0, seed) for seed in (42, 43, 44)}
    groups, since = [theirs], 0
    noise = noise_of(groups)

    def fresh() -> None:
        seed = max(night.seeds) + 1
        theirs[seed] = night.run(night.level, seed)

    for change in night.ideas():
        ours: dict[int, float] = {}
        groups.append(ours)
        word = UNDECIDED
        while word == UNDECIDED:
            seed = next_seed(ours, theirs)
            ours[seed] = night.run(night.level + change, seed)
            if len(ours) > 1:  # one number says nothing of the noise
                noise = noise_of(groups)
            word = decide(ours, theirs, noise)
        night.tried(change, word == BETTER)
        since += 1
        if word == BETTER:
            theirs, since = ours, 0
            fresh()
        elif since == REFRESH:
            since = 0
            fresh()


RULES: dict[str, Callable[[Night], None]] = {"lower": lower, "7ac71bc": as_at_7ac71bc, "seeds": by_seeds}


@dataclass(frozen=True)
class Outcome:
    gains_kept: float
    false_keeps: float
    false_share: float
    runs: float
    gain: float


def nights(rule: Callable[[Night], None], count: int, correlation: float, drift: float) -> Outcome:
    """Half of them drift one way, half the other."""
    tried, gains = [], []
    for number in range(count):
        night = Night(random.Random(number), correlation, drift if number % 2 else -drift)
        with suppress(NightIsOverError):
            rule(night)
        tried += night.experiments
        gains.append(-night.level)
    worth_keeping = -math.sqrt(2) * math.sqrt(2 * (1 - correlation))
    large = [kept for change, kept in tried if change <= worth_keeping]
    none = [kept for change, kept in tried if change >= 0]
    return Outcome(
        gains_kept=fmean(large), false_keeps=fmean(none), false_share=sum(none) / max(1, sum(k for _, k in tried)),
        runs=count * RUNS / len(tried), gain=fmean(gains),
    )  # fmt: skip


def main(args: list[str] | None = None) -> int:
    parser = Parser("bench.nights", __doc__)
    parser.add_argument("--nights", type=int, default=1000, help="of each kind (default: 1000)")
    options = parser.parse_args(args)
    if options.nights < 1:
        parser.error(f"--nights {options.nights} must be at least 1")
    print(f"{'rule':<8}  rho  drift  gains kept  false keeps  of all keeps  runs/experiment  true gain")
    for correlation in CORRELATIONS:
        for drift in DRIFTS:
            for name, rule in RULES.items():
                found = nights(rule, options.nights, correlation, drift)
                print(
                    f"{name:<8}  {correlation:>3}  {drift:>5g}  {found.gains_kept:>10.1%}  {found.false_keeps:>11.1%}"
                    f"  {found.false_share:>12.1%}  {found.runs:>15.2f}  {found.gain:>9.2f}", flush=True,
                )  # fmt: skip
    return 0


if __name__ == "__main__":
    command(main)
