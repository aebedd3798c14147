"""Capacity search on a queue whose answer is known, and its laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
from cachetune.core.errors import CacheTuneError
from cachetune.core.rng import rng
from cachetune.tuner.capacity import Trial, find_capacity, interval, ratio

SERVICE_S = 0.1


def mm1(slo_s: float, n: int = 4000, service_s: float = SERVICE_S):
    """M/M/1, first come first served: P(sojourn <= x) = 1 - exp(-(mu - rate) x)."""

    def evaluate(rate_rps: float, seed: int) -> Trial:
        gaps = rng(seed, "gaps").exponential(size=n) / rate_rps
        work = rng(seed, "work").exponential(size=n) * service_s
        sojourn, last = np.empty(n), 0.0
        for i in range(n):
            last = max(0.0, last - gaps[i]) + work[i]
            sojourn[i] = last
        good = float((sojourn[n // 5 :] <= slo_s).mean())
        return Trial(rate_rps, seed, good, stable=rate_rps * service_s < 1)

    return evaluate


def test_the_interval_holds_the_rate_that_theory_gives():
    slo_s, share = 1.0, 0.9
    known = 1 / SERVICE_S - math.log(1 / (1 - share)) / slo_s
    found = find_capacity(mm1(slo_s), share, range(8))
    assert found.rate is not None
    assert found.rate.low <= known <= found.rate.high
    assert found.rate.high / found.rate.low < 1.2
    again = find_capacity(mm1(slo_s), share, range(8), start_rps=200.0)
    assert again.rate is not None
    assert again.rate.value == pytest.approx(found.rate.value, rel=0.03)


def test_pairs_are_compared_seed_by_seed():
    """Twice as fast a server carries twice the rate; on the same requests almost exactly."""
    slow = find_capacity(mm1(1.0, 800), 0.9, range(4), tolerance=0.005)
    fast = find_capacity(mm1(0.5, 800, SERVICE_S / 2), 0.9, range(4), tolerance=0.005)
    found = ratio(fast, slow)
    assert found is not None and slow.rate is not None
    assert found.value == pytest.approx(2.0, rel=0.01)
    assert found.high / found.low < 0.2 * (slow.rate.high / slow.rate.low - 1) + 1.02


def test_a_level_that_nothing_meets_says_what_is_closest():
    found = find_capacity(mm1(0.05), 0.9, [0])
    assert found.rate is None
    closest = found.closest()
    assert 0.3 < closest.good_share < 0.9
    assert closest.good_share == max(t.good_share for t in found.trials)


def test_one_seed_has_no_interval_and_bad_arguments_are_refused():
    one = find_capacity(mm1(1.0, 500), 0.9, [3])
    assert one.rate is not None and math.isnan(one.rate.low)
    assert interval([2.0, 8.0]).value == pytest.approx(4.0)
    for wrong in ({"attainment": 0.0}, {"attainment": 1.1}, {"seeds": []}, {"seeds": [1, 1]}):
        with pytest.raises(CacheTuneError):
            find_capacity(mm1(1.0), **{"attainment": 0.9, "seeds": [0], **wrong})
