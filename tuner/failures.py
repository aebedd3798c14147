"""How much a count of failures says where they come in bursts: effective numbers, tails, limits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def design_effect(bad: Floats, judged: Floats) -> float:
    """Variance of the failures of all batches over that of independent ones, at least 1.

    Args:
        bad: failures of each batch, any shape.
        judged: requests of each batch, in the same shape.
    """
    n = judged.sum()
    share = bad.sum() / n
    if not 0 < share < 1:
        return 1.0
    beside = bad - share * judged
    variance = float((beside**2).sum()) * bad.size / max(1, bad.size - 1)
    return max(1.0, variance / float(n * share * (1 - share)))


def kish(counts: Floats) -> float:
    """Batches that count: as many equal ones would weigh as much (Kish 1965)."""
    return float(counts.sum() ** 2 / (counts**2).sum()) if counts.any() else float(counts.size)


FREEDOM_MIN = 3.0
"""Degrees of freedom: with fewer, Student's tails would say that nothing at all is known."""


def surprise(confidence: float, freedom: float) -> float:
    """Tail probability of a normal beyond Student's quantile of `confidence`, two-sided."""
    from scipy.stats import norm, t

    return float(norm.sf(t.ppf((1 + confidence) / 2, max(FREEDOM_MIN, freedom))))


def allowed(n: float, share: float, tail: float) -> tuple[float | None, float]:
    """Fewest and most failures of `n` that are not surprising where each fails with `share`.

    Binomial, continued between whole numbers, mid-P: half of what is as likely as seen counts.
    The fewest is None where no failure at all would not be surprising.
    """
    from scipy.optimize import brentq
    from scipy.special import betainc

    def up_to(k: float) -> float:
        """P(X <= k)."""
        return 0.0 if k <= -1 else 1.0 if k >= n else 1.0 - float(betainc(k + 1, n - k, share))

    def below(k: float) -> float:
        return (up_to(k) + up_to(k - 1)) / 2

    mean = n * share
    few = None if below(0) >= tail else float(brentq(lambda k: below(k) - tail, 0.0, mean))
    if 1 - below(n) >= tail:
        return few, n
    return few, float(brentq(lambda k: 1 - below(k) - tail, 0.0, n))
