"""Arrival processes by their moments, closed loops by their shape."""

from __future__ import annotations

import numpy as np
import pytest
from cachetune.core.arrivals import Arrivals, closed_loop, with_arrivals
from cachetune.core.errors import WorkloadError
from cachetune.core.trace_make import Lengths, plain_table
from pydantic import ValidationError

N = 60_000


def gaps(**knobs: object) -> np.ndarray:
    times = Arrivals(rate_rps=4.0, **knobs).times_ns(N, 7)  # type: ignore[arg-type]
    assert (np.diff(times) >= 0).all() and times[0] >= 0
    assert times[-1] / 1e9 * 4 == pytest.approx(N, rel=0.15 if "on_s" in knobs else 0.03)
    return np.diff(times) / 1e9


def test_poisson():
    found = gaps()
    assert found.std() / found.mean() == pytest.approx(1.0, abs=0.02)
    assert (found > 0.5).mean() == pytest.approx(np.exp(-2.0), abs=0.01)


@pytest.mark.parametrize("cv", [0.3, 1.0, 2.5])
def test_gamma(cv: float):
    found = gaps(kind="gamma", cv=cv)
    assert found.std() / found.mean() == pytest.approx(cv, rel=0.05)


def test_even():
    assert gaps(kind="even").std() == pytest.approx(0.0, abs=1e-9)


def test_bursts_keep_the_mean_rate_and_switch():
    found = gaps(kind="bursts", on_s=5.0, off_s=15.0, quiet=0.25)
    # On for 5 of 20 s and a quarter of the rate otherwise: 4 = rate_on * (5 + 0.25 * 15) / 20.
    rate_on = 4.0 * 20 / 8.75
    times = np.cumsum(found)
    counts = np.histogram(times, np.arange(0, times[-1], 1.0))[0]
    assert counts.var() / counts.mean() > 2.0, "more than Poisson's 1"
    assert np.quantile(counts, 0.95) == pytest.approx(rate_on, rel=0.35)
    silent = gaps(kind="bursts", on_s=2.0, off_s=6.0)
    assert silent.max() > 5.0


def test_the_same_seed_gives_the_same_times_and_a_rate_only_scales():
    one, two = (Arrivals(rate_rps=r).times_ns(1000, 3) for r in (1.0, 2.0))
    np.testing.assert_allclose(one, 2 * two, atol=2)
    assert (Arrivals(rate_rps=1.0).times_ns(1000, 3) == one).all()
    assert (Arrivals(rate_rps=1.0).times_ns(1000, 4) != one).any()


def test_closed_loop():
    table = plain_table(10, Arrivals(rate_rps=1.0), Lengths(mean=9), Lengths(mean=2))
    looped = closed_loop(table, 4, 2.0, 0)
    looped.check()
    assert looped.after.tolist() == [-1] * 4 + [0, 1, 2, 3, 4, 5]
    assert looped.arrival_ns[:4].tolist() == [0, 500_000_000, 1_000_000_000, 1_500_000_000]
    many = closed_loop(plain_table(N, Arrivals(rate_rps=1.0), Lengths(mean=9), Lengths(mean=2)),
                       8, 2.0, 0)  # fmt: skip
    assert many.arrival_ns[8:].mean() / 1e9 == pytest.approx(2.0, rel=0.03)
    again = with_arrivals(looped, Arrivals(rate_rps=1.0), 5)
    assert (again.arrival_ns[4:] == looped.arrival_ns[4:]).all(), "pauses stay"


def test_refused():
    for knobs in ({"rate_rps": 0}, {"rate_rps": 1.0, "cv": 2.0}, {"rate_rps": 1.0, "kind": "x"}):
        with pytest.raises(ValidationError):
            Arrivals(**knobs)  # type: ignore[arg-type]
    with pytest.raises(WorkloadError, match="at least one"):
        Arrivals(rate_rps=1.0).times_ns(0, 0)
    with pytest.raises(WorkloadError, match="146 years"):
        Arrivals(rate_rps=1e-9).times_ns(100, 0)
    table = plain_table(3, Arrivals(rate_rps=1.0), Lengths(mean=9), Lengths(mean=2))
    for users, think_s in ((0, 1.0), (1, -1.0), (1, float("nan"))):
        with pytest.raises(WorkloadError, match="closed loop"):
            closed_loop(table, users, think_s, 0)
