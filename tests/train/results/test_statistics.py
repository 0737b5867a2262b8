"""Welch's test against closed forms, and the verdicts on groups whose truth is known."""

import math

import numpy as np
import pytest

from train.results.statistics import student_p, verdict, welch_p


def test_one_and_two_degrees_of_freedom_have_closed_forms():
    for t in (0.0, 1e-3, 0.3, 1.0, 2.5, 40.0, 1e4):
        assert student_p(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), rel=1e-9, abs=1e-15)
        assert student_p(t, 2) == pytest.approx(2 / (2 + t * t + t * math.sqrt(2 + t * t)), rel=1e-9)
        assert student_p(-t, 2) == student_p(t, 2)


@pytest.mark.parametrize("df", [1.37, 3.9, 17.2, 300.5])
def test_other_degrees_of_freedom_by_integration(df):
    t = 1.7
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    x = np.linspace(0, t, 200_001)
    density = scale * (1 + x * x / df) ** (-(df + 1) / 2)
    inside = 2 * ((density[1:] + density[:-1]) / 2 * np.diff(x)).sum()
    assert student_p(t, df) == pytest.approx(1 - inside, rel=1e-8)


def test_welch_on_a_worked_example():
    """Means 2 and 6, variances 1 and 4 of 3 and 3 numbers: t = −4/√(5/3), df = (5/3)²/((1/3)²/2 + (4/3)²/2)."""
    a, b = [1.0, 2.0, 3.0], [4.0, 6.0, 8.0]
    assert welch_p(a, b) == pytest.approx(student_p(-4 / math.sqrt(5 / 3), 50 / 17))
    assert welch_p(a, b) == welch_p(b, a)
    # Equal variances, as of equal steps: 1/2 for each group of two, t = −1/√(1/4 + 1/4), df = 2.
    assert welch_p([1.0, 2.0], [2.0, 3.0]) == pytest.approx(student_p(-math.sqrt(2), 2))


def test_noise_cannot_be_known_without_repeats():
    assert verdict([1.0], [2.0]) == "unknown"
    assert verdict([1.0, 1.1, 1.2], [2.0]) == "unknown"
    assert verdict([1.0, 1.0], [2.0, 2.0]) == "unknown"  # the same run twice shows no noise
    assert verdict([], [1.0, 2.0]) == "unknown"


def test_equal_groups_are_rarely_told_apart():
    rng = np.random.default_rng(0)
    draws = rng.normal(1.0, 0.004, (10_000, 2, 3))
    words = [verdict(a, b) for a, b in draws.tolist()]
    assert words.count("better") / len(words) <= 0.05
    assert words.count("worse") / len(words) <= 0.05
    assert words.count("better") / len(words) > 0.01  # and not because it never says anything


def test_unequal_noise_does_not_fool_it():
    rng = np.random.default_rng(1)
    pairs = zip(rng.normal(1, 0.02, (10_000, 3)).tolist(), rng.normal(1, 0.002, (10_000, 6)).tolist(), strict=True)
    assert sum(verdict(a, b) == "better" for a, b in pairs) / 10_000 <= 0.05


def test_three_standard_deviations_are_found_with_groups_of_five():
    rng = np.random.default_rng(2)
    pairs = zip(rng.normal(1 - 3 * 0.004, 0.004, (10_000, 5)), rng.normal(1, 0.004, (10_000, 5)), strict=True)
    words = [verdict(a.tolist(), b.tolist()) for a, b in pairs]
    assert words.count("better") / len(words) >= 0.80
    assert "worse" not in words
