"""How often the interval of a capacity holds the truth, on queues whose long run is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from cachetune.core.rng import rng
from cachetune.tuner.capacity import find_capacity
from cachetune.tuner.evaluate import falls_behind
from cachetune.tuner.failures import allowed, design_effect, kish, surprise
from cachetune.tuner.trial import BATCHES, Trial
from scipy.stats import binom

SERVICE_S = 0.1
QUESTIONS = 40


def queue(n: int, slo_s: float, bursts: bool) -> Callable[[float, int], Trial]:
    """One server, first come first served; with `bursts` requests come in fours on average."""

    def evaluate(rate_rps: float, seed: int) -> Trial:
        gaps = rng(seed, "gaps").exponential(size=n) / rate_rps
        if bursts:
            gaps *= 4 * (rng(seed, "bursts").random(n) < 0.25)
        work = rng(seed, "work").exponential(size=n) * SERVICE_S
        walk = np.cumsum(np.concatenate([[0.0], work[:-1] - gaps[1:]]))
        sojourn = walk - np.minimum.accumulate(walk) + work
        good = sojourn[n // 5 :] <= slo_s
        parts = np.array_split(good, BATCHES)
        each = tuple(int(p.sum()) for p in parts), tuple(len(p) for p in parts)
        return Trial(rate_rps, seed, float(good.mean()), rate_rps * SERVICE_S - 1, *each)

    return evaluate


def truth_rps(share: float, slo_s: float, bursts: bool) -> float:
    """By theory, or of a million requests."""
    if not bursts:
        return 1 / SERVICE_S - math.log(1 / (1 - share)) / slo_s
    low, high = 0.5, 9.9
    run = queue(1_000_000, slo_s, bursts)
    while high / low > 1.005:
        middle = (low + high) / 2
        low, high = (middle, high) if run(middle, 10**6).good_share >= share else (low, middle)
    return (low + high) / 2


@pytest.mark.parametrize(
    ("share", "bursts"), [(0.9, False), (0.95, False), (0.99, False), (0.9, True), (0.99, True)]
)
def test_intervals_hold_the_long_run(share: float, bursts: bool):
    """95 % are asked for, 90 % wanted; 40 questions of five seeds, 2,000 or 6,000 requests each."""
    slo_s, n = (3.0, 6000) if bursts else (1.0, 2000)
    truth = truth_rps(share, slo_s, bursts)
    held, widths = 0, []
    for first in range(0, 5 * QUESTIONS, 5):
        rate = find_capacity(queue(n, slo_s, bursts), share, range(first, first + 5)).rate
        assert rate is not None
        held += rate.low <= truth <= rate.high
        widths.append(rate.high / max(rate.low, 0.1) - 1)
    assert held >= 0.9 * QUESTIONS
    assert np.median(widths) < 1.0  # and they can be used


def test_intervals_hold_what_can_be_served_where_only_that_limits():
    """Queues that may grow by 5 % carry 1.05 of what is served; 40 questions of five seeds."""
    n, held, values = 2000, 0, []

    def evaluate(rate_rps: float, seed: int) -> Trial:
        gaps = rng(seed, "gaps").exponential(size=n) / rate_rps
        work = rng(seed, "work").exponential(size=n) * SERVICE_S
        walk = np.cumsum(np.concatenate([[0.0], work[:-1] - gaps[1:]]))
        wait_s = walk - np.minimum.accumulate(walk)
        behind = falls_behind((np.cumsum(gaps) * 1e9).astype(np.int64), 1e3 * wait_s)
        each = (n // BATCHES,) * BATCHES
        return Trial(rate_rps, seed, 1.0, behind, each, each)

    for first in range(0, 5 * QUESTIONS, 5):
        found = find_capacity(evaluate, 0.9, range(first, first + 5))
        assert found.rate is not None and found.grows
        held += found.rate.low <= 1.05 / SERVICE_S <= found.rate.high
        values.append(found.rate.value * SERVICE_S)
    assert held >= 0.9 * QUESTIONS
    assert np.median(values) == pytest.approx(1.05, rel=0.02)


def test_the_failures_allowed_are_those_of_the_binomial():
    for n, share in ((50, 0.1), (800, 0.01), (300, 0.05)):
        few, many = allowed(n, share, 0.025)
        assert few is not None
        for k, tail in ((math.floor(few), binom.cdf), (math.ceil(many), binom.sf)):
            assert tail(k, n, share) < 0.04
        assert binom.cdf(math.ceil(few) + 1, n, share) > 0.025 < binom.sf(many - 2, n, share)
    assert allowed(100, 0.01, 0.025)[0] is None  # even none would not be surprising


def test_bursts_make_requests_fewer():
    judged = np.full(10, 100.0)
    even, burst = np.full(10, 5.0), np.array([50.0] + [0.0] * 9)
    assert design_effect(even, judged) == 1.0
    assert design_effect(burst, judged) == pytest.approx(50 * 50 * 0.9 * 10 / 9 / (1000 * 0.0475))
    assert (kish(even), kish(burst)) == (10.0, 1.0)
    assert surprise(0.95, 1e9) == pytest.approx(0.025) and surprise(0.95, 5) < 0.01
