"""Ops of different streams slow each other, and an idle stream wakes: timetables by hand."""

from __future__ import annotations

import pytest
from cachetune.core.executor import execute
from cachetune.core.ops import COMPUTE, RESTORE, Op, Schedule
from cachetune.simulator.executor import SimExecutor
from support import NS, make_op, make_profile, make_tier, timetable

ALONE_NS = 100
"""A prefill without rows costs its overhead, a restore without rows 5 ns."""


def run(coefficients_s: dict[str, float], *ops: Op, link: float = 1e9) -> list[tuple[int, ...]]:
    tiers = {"dram": make_tier(link, worker=1e9)}
    zero = {"load.op": 0.0, "restore.op": 40 * NS}
    profile = make_profile(tiers=tiers, coefficients_s={**zero, **coefficients_s})
    return timetable(execute(Schedule.of(ops), SimExecutor(profile)))


def prefill(op_id: int, *deps: int) -> Op:
    return make_op(op_id, "prefill", COMPUTE, deps=deps)


def restore(op_id: int, *deps: int, stream: str = RESTORE) -> Op:
    return make_op(op_id, "restore", stream, deps=deps)


def load(op_id: int, n_bytes: int) -> Op:
    return make_op(op_id, "load", "io.dram.0", n_bytes=n_bytes, tier="dram")


def test_without_shares_nothing_is_slowed():
    assert run({}, prefill(0), restore(1)) == [(1, 0, 40), (0, 0, 100)]


def test_compute_loses_half_its_speed_while_a_restore_runs():
    """40 ns at half speed leave 80 of 100; they end at 120."""
    shares = {"interference.compute.restore": 0.5}
    assert run(shares, prefill(0), restore(1)) == [(1, 0, 40), (0, 0, 120)]


def test_both_lose():
    """The restore at 0.8 needs 50; compute did 25 of 100 by then and ends at 125."""
    shares = {"interference.compute.restore": 0.5, "interference.restore.compute": 0.2}
    assert run(shares, prefill(0), restore(1)) == [(1, 0, 50), (0, 0, 125)]


def test_a_restore_on_the_compute_stream_slows_nobody():
    shares = {"interference.compute.restore": 0.5, "interference.restore.compute": 0.5}
    assert run(shares, prefill(0), restore(1, stream=COMPUTE)) == [(0, 0, 100), (1, 100, 140)]


@pytest.mark.parametrize(("link", "end"), [(1e9, 120), (0.1e9, 106), (0.001e9, 101)])
def test_a_limited_tier_counts_by_the_share_of_its_medium(link: float, end: int):
    """A load of 40 ns on the medium's own link costs 20; behind a limiter it mostly sleeps.

    At a tenth of the rate 40 bytes take 400 ns: compute runs at 0.95 all along, ends at 106.
    """
    shares = {"interference.compute.dram": 0.5}
    times = {op: stop for op, _, stop in run(shares, prefill(0), load(1, 40), link=link)}
    assert times[0] == end


def test_the_own_work_of_a_limited_load_counts_as_any():
    """60 ns at half speed leave 70 of 100; beside bytes that trickle they take 71."""
    shares = {"load.op": 60 * NS, "interference.compute.dram": 0.5}
    times = {op: stop for op, _, stop in run(shares, prefill(0), load(1, 40), link=0.001e9)}
    assert times[0] == 131


def test_a_load_loses_its_own_work_to_others_but_never_to_itself():
    """Its overhead of 60 ns takes 120 at half speed; its 40 bytes follow at the link's rate."""
    shares = {"load.op": 60 * NS, "interference.io.compute": 0.5, "interference.io.dram": 0.5}
    assert run(shares, load(0, 40)) == [(0, 0, 100)]
    assert run(shares, load(0, 40), prefill(1), prefill(2)) == [
        (1, 0, 100),
        (0, 0, 160),
        (2, 100, 200),
    ]


def test_loads_side_by_side_slow_each_other():
    """Both work at half speed for 120 ns, then 40 bytes each on a link of one byte per ns."""
    shares = {"load.op": 60 * NS, "interference.io.dram": 0.5}
    beside = make_op(1, "load", "io.dram.1", n_bytes=40, tier="dram")
    assert run(shares, load(0, 40), beside) == [(0, 0, 200), (1, 0, 200)]


def test_no_op_stands_still():
    """Shares above one leave a fifth of the speed: 40 ns did 8, 92 are left."""
    shares = {"interference.compute.restore": 5.0}
    assert run(shares, prefill(0), restore(1)) == [(1, 0, 40), (0, 0, 132)]


def test_an_idle_stream_wakes():
    """The first op of a stream always wakes it; one right behind another does not."""
    ms = 1_000_000
    wake = {"prefill.wake": 7 * NS}
    assert run(wake, prefill(0), prefill(1)) == [(0, 0, 107), (1, 107, 207)]
    waited = make_op(2, "prefill", COMPUTE, deps=(1,))
    times = run(wake, prefill(0), load(1, 2 * ms), waited)
    assert times == [(0, 0, 107), (1, 0, 2 * ms), (2, 2 * ms, 2 * ms + 107)]
