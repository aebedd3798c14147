"""Coarse clocks: found, and spread without changing order, rate or requests."""

from __future__ import annotations

import numpy as np
import pytest
from cachetune.core.arrivals import Arrivals
from cachetune.core.trace_make import Lengths, plain_table
from cachetune.core.trace_ticks import tick_s, without_ticks
from serving_support import make_table


def test_a_coarse_clock_is_found_and_spread() -> None:
    times = np.repeat([0.0, 3.0, 5.999, 9.0, 30.0], [12, 7, 9, 1, 11])
    table = make_table(range(1, 41), [5] * 40, times)
    assert tick_s(table) == pytest.approx(3.0, abs=0.01)
    spread = without_ticks(table, 0)
    spread.check()
    assert tick_s(spread) is None and without_ticks(spread, 0) is spread
    assert (spread.prompt_tokens == table.prompt_tokens).all(), "in their order"
    later_s = (spread.arrival_ns - table.arrival_ns) / 1e9
    assert later_s.min() >= 0 and 2.5 < later_s.max() < 3.1, "no further than a tick"
    assert np.array_equal(np.sort(spread.arrival_ns), spread.arrival_ns)
    assert (without_ticks(table, 0).arrival_ns == spread.arrival_ns).all()
    assert (without_ticks(table, 1).arrival_ns != spread.arrival_ns).any()


def test_who_follows_another_keeps_the_pause() -> None:
    after = np.array([-1, -1, -1, -1, -1, -1, 0], np.int32)
    table = make_table([9] * 7, [5] * 7, [0, 0, 3, 3, 6, 6, 0.25], after=after)
    assert without_ticks(table, 0).arrival_ns[6] == 250_000_000


@pytest.mark.parametrize("times", [[0.0] * 8, [0.0, 1.0, 1.0, 2.0, 3.0], [0.0]])
def test_a_clock_that_is_none_or_fine_stays(times: list[float]) -> None:
    table = make_table([9] * len(times), [5] * len(times), times)
    assert tick_s(table) is None and without_ticks(table, 0) is table
    poisson = plain_table(500, Arrivals(rate_rps=9.0), Lengths(mean=9), Lengths(mean=9), 0)
    assert tick_s(poisson) is None
