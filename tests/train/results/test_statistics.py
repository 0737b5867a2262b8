"""The difference of two experiments and its noise: against closed forms, known truths, and whole nights."""

import math

import numpy as np
import pytest
from scipy import stats

from bench.nights import RULES, nights
from train.results.statistics import (
    BETTER,
    ENOUGH,
    ERROR,
    FIRST_LOOK,
    NOT_BETTER,
    UNDECIDED,
    Noise,
    decide,
    difference,
    error_of,
    looks,
    noise_of,
    paired,
    spread,
    to_go_on,
    welch_p,
)


def test_one_experiment_shows_how_much_a_number_varies():
    assert noise_of([]) is None
    assert noise_of([{42: 1.0}, {42: 2.0}, {43: 3.0}]) is None
    assert noise_of([{42: 1.0, 43: 1.0}]) is None  # the same number twice shows no noise
    found = noise_of([{42: 1.0, 43: 2.0, 44: 3.0}, {42: 9.0}])
    assert (found.variance, found.correlation, found.df) == (pytest.approx(1.0), None, 2)
    pooled = noise_of([{42: 1.0, 43: 2.0, 44: 3.0}, {45: 5.0, 46: 9.0}])
    assert (pooled.variance, pooled.df) == (pytest.approx((2.0 + 8.0) / 3), 3)


def test_what_seeds_have_in_common_is_found():
    """By hand: three experiments on three seeds; the second differs from the first by 1 but for ±e."""
    e = 0.1
    groups = [{1: 0.0, 2: 5.0, 3: 10.0}, {1: 1.0 + e, 2: 6.0 - e, 3: 11.0}, {1: 2.0 - e, 2: 7.0 + e, 3: 12.0}]
    found = noise_of(groups)
    table = np.array([[*g.values()] for g in groups])
    left = table - table.mean(0) - table.mean(1)[:, None] + table.mean()
    assert found.df == 4 >= ENOUGH
    own = (left**2).sum() / 4
    within = ((table - table.mean(1)[:, None]) ** 2).sum() / 6
    assert found.variance == pytest.approx(within)
    # All but the seed's own: there is a limit to what is believed.
    assert found.correlation == pytest.approx(max(0.0, 1 - max(own, 0.001 * within) / within))
    assert found.of_a_difference == pytest.approx(math.sqrt(2 * max(own, 0.001 * within)))


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_the_estimates_are_those_of_made_up_experiments(correlation):
    rng = np.random.default_rng(0)
    found = []
    for _ in range(300):
        seeds = rng.normal(0, math.sqrt(correlation), 5)
        groups = [
            dict(enumerate(level + seeds + rng.normal(0, math.sqrt(1 - correlation), 5)))
            for level in rng.normal(0, 3, 4)
        ]
        found.append(noise_of(groups))
    own = np.mean([noise.of_a_difference**2 for noise in found])
    assert own == pytest.approx(2 * (1 - correlation), rel=0.2)
    assert np.mean([noise.variance for noise in found]) == pytest.approx(1.0, rel=0.15)


def test_where_the_seed_is_nothing_it_is_the_difference_of_means():
    ours, theirs = {1: 1.0, 2: 2.0}, {1: 4.0, 3: 5.0, 4: 9.0}
    found = difference(ours, theirs, Noise(4.0, 0.0, 7))
    assert found.mean == pytest.approx(1.5 - 6.0)
    assert found.error == pytest.approx(math.sqrt(4.0 * (1 / 2 + 1 / 3)))
    assert found.df == 7


def test_where_the_seed_is_nearly_all_it_is_that_of_the_pairs():
    ours, theirs = {1: 1.0, 2: 7.0}, {1: 2.0, 2: 8.5, 3: 90.0}
    off = [abs(difference(ours, theirs, Noise(100.0, correlation, 7)).mean + 1.25) for correlation in (0.99, 0.9, 0.0)]
    assert off == sorted(off)
    assert off[0] < 1
    paired = {seed: theirs[seed] for seed in ours}
    found = difference(ours, paired, Noise(100.0, 0.8, 7))
    assert found.mean == pytest.approx(-1.25)
    assert found.error == pytest.approx(math.sqrt(2 * 100.0 * 0.2 / 2))


def test_where_nothing_is_known_of_the_seeds_their_luck_counts_on_neither_side():
    """Code that computes the same is no worse on an unlucky seed, and no better on a lucky one."""
    theirs, noise = {42: 1.000, 43: 1.010, 44: 0.990}, Noise(1e-4, None, 2)
    for seed, value in theirs.items():
        assert difference({seed: value}, theirs, noise).mean == 0.0
        assert decide({seed: value}, theirs, noise) == NOT_BETTER
    found = difference({42: 0.98, 44: 0.98}, theirs, noise)
    assert found.mean == pytest.approx(-0.015)
    assert found.error == pytest.approx(0.01)  # of two pairs of two runs, as if seeds had nothing in common
    assert difference({7: 0.98}, theirs, noise).mean == pytest.approx(-0.02)  # no pair: the means are all there is
    assert paired({42: 0.98, 9: 1.0}, theirs) == {42: pytest.approx(-0.02)}


def test_no_other_linear_unbiased_estimate_varies_less():
    rng = np.random.default_rng(1)
    noise = Noise(1.0, 0.6, 9)
    estimates, pairs, means = [], [], []
    for _ in range(4000):
        seed = rng.normal(0, math.sqrt(0.6), 4)
        ours = {i: seed[i] + rng.normal(0, math.sqrt(0.4)) for i in (0, 1)}
        theirs = {i: seed[i] + rng.normal(0, math.sqrt(0.4)) for i in (0, 1, 2, 3)}
        estimates.append(difference(ours, theirs, noise).mean)
        pairs.append(np.mean([ours[i] - theirs[i] for i in ours]))
        means.append(np.mean([*ours.values()]) - np.mean([*theirs.values()]))
    assert np.std(estimates) == pytest.approx(difference(ours, theirs, noise).error, rel=0.05)
    assert np.std(estimates) < min(np.std(pairs), np.std(means))


def test_p_and_interval_are_those_of_students_t():
    found = difference({1: 1.0}, {1: 3.0}, Noise(1.0, 0.5, 5))
    assert found.p == pytest.approx(stats.t.cdf(-2.0, 5))
    half = stats.t.ppf(0.975, 5)
    assert found.interval == (pytest.approx(-2 - half), pytest.approx(-2 + half))


@pytest.mark.parametrize("max_seeds", [2, 3, 5])
def test_all_looks_together_err_as_often_as_is_said(max_seeds):
    """By drawing, where the levels come from an integral."""
    plan = looks(max_seeds)
    assert error_of(plan) == pytest.approx(ERROR, abs=2e-3)
    assert plan.better[0] == FIRST_LOOK
    assert len(set(plan.better[1:])) == 1
    rng = np.random.default_rng(2)
    sums = rng.normal(0, 1, (200_000, max_seeds)).cumsum(axis=1) / np.sqrt(np.arange(1, max_seeds + 1))
    p = stats.norm.cdf(sums)
    alive, called = np.ones(len(p), bool), 0
    for k in range(max_seeds):
        called += (alive & (p[:, k] <= plan.better[k])).sum()
        alive &= (p[:, k] > plan.better[k]) & (p[:, k] <= plan.stop[k])
    assert called / len(p) == pytest.approx(ERROR, abs=5e-3)
    assert not alive.any()  # the last look decides


def test_larger_gains_are_found_more_often():
    found = [error_of(looks(3), gain) for gain in (0.0, 0.7, 1.4, 2.8)]
    assert found == sorted(found)
    assert found[-1] > 0.97


def test_seed_after_seed_until_it_is_known():
    theirs = {1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0}
    noise = Noise(1e-4, 0.0, 30)  # σ = 0.01, and 0.011 of a number less the mean of four
    assert decide({1: 1.05}, theirs, noise) == NOT_BETTER
    assert decide({1: 0.999}, theirs, noise) == NOT_BETTER  # no worse, and no gain to be seen
    assert decide({1: 0.99}, theirs, noise) == UNDECIDED
    assert decide({1: 0.99, 2: 0.985}, theirs, noise) == BETTER
    assert decide({1: 0.99, 2: 1.02}, theirs, noise) == NOT_BETTER
    assert decide({1: 0.95}, theirs, noise) == BETTER  # overwhelming
    assert decide({1: 0.99}, theirs, noise, max_seeds=1) == NOT_BETTER
    # What was known is known, whatever came after: later seeds do not bring back what was given up.
    assert decide({1: 1.05, 2: 0.9, 3: 0.9}, theirs, noise) == NOT_BETTER


def test_an_estimate_of_few_degrees_of_freedom_asks_for_more():
    theirs = {1: 1.0, 2: 1.0}
    assert decide({1: 0.97}, theirs, Noise(1e-4, 0.0, 100)) == BETTER
    assert decide({1: 0.97}, theirs, Noise(1e-4, 0.0, 2)) == UNDECIDED


@pytest.mark.parametrize("correlation", [0.0, 0.7])
def test_what_a_first_number_has_to_be_below(correlation):
    theirs, noise = {1: 1.0, 2: 1.02, 3: 0.99}, Noise(1e-4, correlation, 6)
    bar = to_go_on(2, theirs, noise)
    assert decide({2: bar - 1e-9}, theirs, noise) == UNDECIDED
    assert decide({2: bar + 1e-9}, theirs, noise) == NOT_BETTER


def test_welch_is_scipys_and_says_where_nothing_is_known():
    a, b = [1.0, 2.0, 3.0], [4.0, 6.0, 8.0]
    # Means 2 and 6, variances 1 and 4 of 3 and 3 numbers: t = −4/√(5/3), df = (5/3)²/((1/3)²/2 + (4/3)²/2).
    assert welch_p(a, b) == pytest.approx(2 * stats.t.cdf(-4 / math.sqrt(5 / 3), 50 / 17))
    assert welch_p([1.0], [2.0, 3.0]) is None
    assert welch_p([1.0, 1.0], [2.0, 2.0]) is None


def test_spread():
    assert spread([]) == "-"
    assert spread([1.0]) == "1.000000 (1)"
    assert spread([1.0, 3.0]) == "2.000000 ± 1.414214 (2)"


@pytest.mark.parametrize("correlation", [0.0, 0.8])
def test_in_whole_nights_gains_are_kept_and_little_else(correlation):
    """A few nights of those of `python -m bench.nights`, whose table bench/LOG.md has."""
    ours, lower, before = (nights(RULES[name], 60, correlation, 0.0) for name in ("seeds", "lower", "7ac71bc"))
    assert ours.gains_kept > 0.7
    assert ours.false_keeps < 0.05
    assert ours.false_share < 0.4
    assert ours.runs < 1.4
    assert ours.gain > 2.5 * before.gain
    assert ours.gain > 0.7 * lower.gain
    assert lower.false_share > 0.5
    assert before.gains_kept < 0.35


def test_a_drifting_machine_is_followed():
    ours = nights(RULES["seeds"], 60, 0.5, 2.0)
    assert ours.gains_kept > 0.7
    assert ours.false_keeps < 0.06
    assert ours.false_share < 0.45
