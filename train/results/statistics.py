"""Whether two groups of numbers differ by more than their noise: Welch's t-test.

Source: Welch, "The generalization of Student's problem when several different population variances are involved",
Biometrika 34 (1947); the degrees of freedom after Welch and Satterthwaite.
"""

import math
from collections.abc import Sequence
from statistics import mean, stdev, variance

SIGNIFICANCE = 0.05  # two-sided: under equal means "better" comes out at most 2.5 % of the time, and so does "worse"
FRACTION_TERMS = 40  # of the continued fraction: to the last digit up to 10,000 degrees of freedom


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (DLMF 8.17.22)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # on this side the fraction converges slowly, and for 1 − x fast
        return 1 - incomplete_beta(b, a, 1 - x)
    fraction = 1.0
    for m in range(FRACTION_TERMS, 0, -1):
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        fraction = 1 + even / (1 + odd / fraction)
    fraction = 1 - (a + b) * x / (a + 1) / fraction
    log_front = a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    return math.exp(log_front) / (a * fraction)


def student_p(t: float, df: float) -> float:
    """The probability that Student's t with `df` degrees of freedom is at least as far from 0 as `t`."""
    return incomplete_beta(df / 2, 0.5, df / (df + t * t))


def welch_p(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Two-sided p of "equal means". None where noise cannot be known: fewer than two numbers, or none that differ."""
    if min(len(a), len(b)) < 2:
        return None
    va, vb = variance(a) / len(a), variance(b) / len(b)
    if va + vb == 0:
        return None
    t = (mean(a) - mean(b)) / math.sqrt(va + vb)
    df = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    return student_p(t, df)


def verdict(a: Sequence[float], b: Sequence[float]) -> str:
    """`better`, `worse` or `within noise`: what `a` is beside `b`, where less is better; `unknown` without repeats."""
    p = welch_p(a, b)
    if p is None:
        return "unknown"
    if p >= SIGNIFICANCE:
        return "within noise"
    return "better" if mean(a) < mean(b) else "worse"


def spread(values: Sequence[float]) -> str:
    """`mean ± standard deviation (n)`."""
    if not values:
        return "-"
    deviation = f" ± {stdev(values):.6f}" if len(values) > 1 else ""
    return f"{mean(values):.6f}{deviation} ({len(values)})"
