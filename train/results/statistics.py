"""Whether an experiment is better than the incumbent, seed after seed, until it is known.

The same seed is the same initial weights and the same batches: what a seed does to a number, it may do to both sides.
How much a number varies (σ²), and which share of that is its seed's (ρ), is not known from two or three runs. Both are
estimated from all repeats that may be compared, pooled: σ² inside experiments, (1 − ρ)·σ² from what is left when an
experiment's mean and a seed's effect are taken off (analysis of variance in two ways: Scheffé, "The Analysis of
Variance", 1959, chapter 4). The difference of two experiments is then their best linear unbiased one (generalised least
squares: Aitken, Proc. R. Soc. Edinburgh 55, 1935): where the seed is all, the mean over the pairs of one seed; where it
is nothing, the difference of the means of all runs; and what lies between.

The difference is looked at after every seed, and stops being looked at as soon as it is plainly no gain: a group
sequential test with the same nominal level at each look but the first (Pocock, Biometrika 64, 1977), and with binding
limits for stopping without a gain, so that all looks together call no difference a gain with probability `ERROR`
(Jennison and Turnbull, "Group Sequential Methods", 2000, chapters 2 and 4). σ being estimated, the levels are those of
Student's t (chapter 11 there).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean, stdev

import numpy as np
from scipy import optimize, signal, special, stats

from ..config import MAX_SEEDS

BETTER, NOT_BETTER, UNDECIDED = "better", "not better", "undecided"
# One-sided, of all looks together, beside an incumbent that is known as little as the challenger. `python -m
# bench.nights` says what becomes of it in whole nights: a lucky incumbent stays longer than an unlucky one, and no gain
# is kept in a third of so many cases.
ERROR = 0.15
FIRST_LOOK = 0.03  # the level of the first: one seed decides for a gain only where that is overwhelming
GIVE_UP, GIVE_UP_FALLS = 0.30, 0.8  # p above which the first look ends it; times so much at each that follows
SIGNIFICANCE = 0.05  # two-sided, of a comparison of two groups that were run anyway
ENOUGH = 3  # degrees of freedom of what is left beside group and seed; with fewer, nothing is said of the seeds
MOST = 0.999  # of a number's variance that a seed may be believed to make

Numbers = Mapping[int, float]  # of an experiment, by seed, in the order in which they were run


@dataclass(frozen=True)
class Noise:
    """How much a run's number varies over seeds.

    Args:
        variance: of a number.
        correlation: of two experiments' numbers on one seed; None where that is not known yet.
        df: degrees of freedom of the estimate.
    """

    variance: float
    correlation: float | None
    df: int

    @property
    def of_a_difference(self) -> float:
        """The standard deviation of a difference of two runs on one seed, or more where that is not known."""
        return math.sqrt(2 * self.variance * (1 - (self.correlation or 0.0)))


def noise_of(groups: Sequence[Numbers]) -> Noise | None:
    """From comparable experiments. None where nothing is known: no experiment has two seeds, or no repeats differ."""
    repeated = [group for group in groups if len(group) > 1]
    rows = [(g, seed, value) for g, group in enumerate(repeated) for seed, value in group.items()]
    if not rows:
        return None
    means = [fmean(group.values()) for group in repeated]
    df = len(rows) - len(repeated)
    variance = sum((value - means[g]) ** 2 for g, _, value in rows) / df
    if variance <= 0:
        return None
    left, left_df = _left_beside_group_and_seed(rows, len(repeated))
    if left_df < ENOUGH:
        return Noise(variance, None, df)
    own = max(left / left_df, (1 - MOST) * variance)
    variance = max(variance, own)
    return Noise(variance, 1 - own / variance, left_df)


def _left_beside_group_and_seed(rows: Sequence[tuple[int, int, float]], num_groups: int) -> tuple[float, int]:
    """The sum of squares, and its degrees of freedom."""
    seeds = sorted({seed for _, seed, _ in rows})
    design = np.zeros((len(rows), num_groups + len(seeds)))
    for i, (g, seed, _) in enumerate(rows):
        design[i, g] = design[i, num_groups + seeds.index(seed)] = 1.0
    values = np.array([value for *_, value in rows])
    values -= values.mean()  # numbers near 1 that differ in the fourth digit
    fit, _, rank, _ = np.linalg.lstsq(design, values, rcond=None)
    return float(((values - design @ fit) ** 2).sum()), len(rows) - int(rank)


@dataclass(frozen=True)
class Difference:
    """Of two experiments: the estimate, its standard error, and the degrees of freedom of that."""

    mean: float
    error: float
    df: int

    @property
    def p(self) -> float:
        """One-sided: how likely a difference as low as this one is where there is none."""
        return float(special.stdtr(self.df, self.mean / self.error))

    @property
    def interval(self) -> tuple[float, float]:
        """Between which the true difference lies with 95 %, looked at once."""
        half = float(special.stdtrit(self.df, 1 - SIGNIFICANCE / 2)) * self.error
        return self.mean - half, self.mean + half


@cache
def _weights(both: int, ours: int, theirs: int, correlation: float) -> tuple[np.ndarray, float]:
    """Of runs on seeds that both have (ours, then theirs), that we alone have, that they alone have: what each counts
    in the difference, and the variance of that in units of a run's."""
    sides = [0] * both + [1] * both + [0] * ours + [1] * theirs
    seeds = [*range(both), *range(both), *range(both, both + ours + theirs)]
    same = np.equal.outer(seeds, seeds)
    covariance = np.where(same, correlation, 0.0) + (1 - correlation) * np.eye(len(seeds))
    design = np.array([[side == 0, side == 1] for side in sides], dtype=float)
    weighted = design.T @ np.linalg.inv(covariance)
    means = np.linalg.solve(weighted @ design, weighted)
    weights = means[0] - means[1]
    return weights, float(weights @ covariance @ weights)


def difference(ours: Numbers, theirs: Numbers, noise: Noise) -> Difference:
    """Ours less theirs, by all of both. Where it is not known what seeds have in common, by the pairs of one seed, as
    if they had nothing: that owes nothing to a seed's luck, and its error is too large rather than too small."""
    both = [seed for seed in ours if seed in theirs]
    if both and noise.correlation is None:
        middle = fmean(ours[seed] - theirs[seed] for seed in both)
        return Difference(middle, noise.of_a_difference / math.sqrt(len(both)), noise.df)
    alone = [value for seed, value in ours.items() if seed not in theirs]
    others = [value for seed, value in theirs.items() if seed not in ours]
    weights, variance = _weights(len(both), len(alone), len(others), round(noise.correlation or 0.0, 3))
    values = [*(ours[seed] for seed in both), *(theirs[seed] for seed in both), *alone, *others]
    return Difference(float(np.dot(weights, values)), math.sqrt(noise.variance * variance), noise.df)


@dataclass(frozen=True)
class Looks:
    """Levels of p, look by look: below `better` it is a gain, above `stop` it is none."""

    better: tuple[float, ...]
    stop: tuple[float, ...]


@cache
def looks(max_seeds: int) -> Looks:
    """The levels for at most so many seeds: those of the later looks are equal, and such that all of them together err
    by `ERROR`."""
    if max_seeds == 1:
        return Looks((ERROR,), (ERROR,))

    def of(level: float) -> Looks:
        give_up = [max(level, GIVE_UP * GIVE_UP_FALLS**k) for k in range(max_seeds - 1)]
        return Looks((FIRST_LOOK,) + (level,) * (max_seeds - 1), (*give_up, level))

    return of(optimize.brentq(lambda level: error_of(of(level)) - ERROR, 1e-4, 0.4))


def error_of(plan: Looks, gain: float = 0.0) -> float:
    """The probability that a true gain of `gain` · σ_d is called one: with no gain, the error. σ_d known; an integral
    over the sum of the differences, look after look."""
    step = 0.02
    reach = np.arange(-10, 10 + step / 2, step)
    one = stats.norm.pdf(reach, -gain, 1)
    sums, called = one, 0.0
    for k, (better, stop) in enumerate(zip(plan.better, plan.stop, strict=True), 1):
        low, high = (stats.norm.ppf(level) * math.sqrt(k) for level in (better, stop))
        called += sums[reach <= low].sum() * step
        undecided = np.where((reach > low) & (reach <= high), sums, 0.0)
        sums = signal.fftconvolve(undecided, one, mode="same") * step
    return float(called)


def decide(ours: Numbers, theirs: Numbers, noise: Noise, max_seeds: int = MAX_SEEDS) -> str:
    """What is known of an experiment after its runs so far, in the order in which they came: a look after each."""
    plan, seen = looks(max(max_seeds, len(ours))), {}
    for (seed, value), better, stop in zip(ours.items(), plan.better, plan.stop, strict=False):
        seen[seed] = value
        p = difference(seen, theirs, noise).p
        if p <= better:
            return BETTER
        if p > stop:
            return NOT_BETTER
    return UNDECIDED


def paired(ours: Numbers, theirs: Numbers) -> dict[int, float]:
    """The differences on the seeds that both have."""
    return {seed: value - theirs[seed] for seed, value in ours.items() if seed in theirs}


def to_go_on(seed: int, theirs: Numbers, noise: Noise, max_seeds: int = MAX_SEEDS) -> float:
    """Below which a first number, on this seed, is not given up."""
    at = difference({seed: 0.0}, theirs, noise)
    return float(special.stdtrit(noise.df, looks(max_seeds).stop[0])) * at.error - at.mean


def welch_p(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Two-sided p of "equal means" for runs that share no seed: Welch's t-test. None where noise cannot be known: fewer
    than two numbers, or none that differ."""
    if min(len(a), len(b)) < 2 or len(set(a)) == len(set(b)) == 1:
        return None
    return float(stats.ttest_ind(a, b, equal_var=False).pvalue)


def spread(values: Sequence[float]) -> str:
    """`mean ± standard deviation (n)`."""
    if not values:
        return "-"
    deviation = f" ± {stdev(values):.6f}" if len(values) > 1 else ""
    return f"{fmean(values):.6f}{deviation} ({len(values)})"
