"""Loads that share a link: timetables by hand, and an exact reference in fractions."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
from cachetune.core.executor import execute
from cachetune.core.ops import Op, Schedule
from cachetune.simulator.executor import SimExecutor
from support import NS, make_op, make_profile, make_tier, timetable


def load(op_id: int, n_bytes: int, worker: int = 0, tier: str = "t", n_reads: int = 0) -> Op:
    stream = f"io.{tier}.{worker}"
    return make_op(op_id, "load", stream, n_bytes=n_bytes, n_reads=n_reads, tier=tier)


def executor(link: float = 1e9, worker: float | None = None, latency_s: float = 0.0) -> SimExecutor:
    """Tiers `t` and `u` with one link each; nothing else costs anything."""
    tier = make_tier(link, worker, latency_s)
    return SimExecutor(make_profile(tiers={"t": tier, "u": tier}, coefficients_s={"load.op": 0.0}))


def run(sim: SimExecutor, *ops: Op) -> list[tuple[int, int, int]]:
    return timetable(execute(Schedule.of(ops), sim))


def test_one_load_has_the_link():
    assert run(executor(), load(0, 1000)) == [(0, 0, 1000)]


def test_two_loads_share_evenly_then_the_longer_has_it_all():
    """Half rate until the shorter one's 1000 bytes are there at 2000; 2000 more at full rate."""
    assert run(executor(), load(0, 1000, 0), load(1, 3000, 1)) == [(0, 0, 2000), (1, 0, 4000)]


def test_a_worker_cannot_use_more_than_its_own_rate():
    """Two workers of 0.4 fit a link of 1; three share it at a third each."""
    sim = executor(link=1e9, worker=0.4e9)
    assert run(sim, load(0, 400, 0), load(1, 800, 1)) == [(0, 0, 1000), (1, 0, 2000)]
    sim = executor(link=1e9, worker=0.4e9)
    assert run(sim, load(0, 300, 0), load(1, 300, 1), load(2, 700, 2)) == [
        (0, 0, 900),
        (1, 0, 900),
        (2, 0, 1900),
    ]


def test_loads_of_one_worker_take_turns():
    assert run(executor(), load(0, 10), load(1, 20)) == [(0, 0, 10), (1, 10, 30)]


def test_a_load_that_joins_slows_the_others():
    """1 starts at 500: 0 has 500 left, which take 1000 at half rate."""
    sim = executor()
    sim.submit([load(0, 1000, 0)])
    assert sim.wait(500) == []
    sim.submit([load(1, 1000, 1)])
    assert timetable([*sim.wait(None), *sim.wait(None)]) == [(0, 0, 1500), (1, 500, 2000)]


def test_read_latency_uses_no_bandwidth():
    """Two reads of 50 ns first; 0 has the link alone meanwhile."""
    sim = executor(latency_s=50 * NS)
    assert run(sim, load(0, 100, 0), load(1, 100, 1, n_reads=2)) == [(0, 0, 100), (1, 0, 200)]


def test_tiers_do_not_share():
    assert run(executor(), load(0, 100, 0, "t"), load(1, 100, 0, "u")) == [(0, 0, 100), (1, 0, 100)]


def test_no_bytes_no_link():
    assert run(executor(), load(0, 100, 0), load(1, 0, 1)) == [(1, 0, 0), (0, 0, 100)]


def test_a_byte_that_needs_part_of_a_nanosecond_ends_in_the_next():
    assert run(executor(link=3e9), load(0, 10)) == [(0, 0, 4)]


def reference(loads: list[tuple[int, int]], link: Fraction, worker: Fraction) -> list[Fraction]:
    """Ends under fluid sharing, exactly: (start, bytes) each; rates in bytes per ns."""
    left = {i: Fraction(n) for i, (_, n) in enumerate(loads)}
    ends = [Fraction(0)] * len(loads)
    now = Fraction(0)
    while left:
        active = [i for i in left if loads[i][0] <= now]
        starts = [Fraction(loads[i][0]) for i in left if loads[i][0] > now]
        if not active:
            now = min(starts)
            continue
        rate = min(worker, link / len(active))
        step = min([left[i] / rate for i in active] + [s - now for s in starts])
        now += step
        for i in active:
            left[i] -= rate * step
            if not left[i]:
                del left[i]
                ends[i] = now
    return ends


@pytest.mark.parametrize("seed", range(6))
def test_sharing_is_exact_to_the_nanosecond(seed: int):
    """Many joins and leaves at awkward rates: no load is early, none late by more than the
    nanoseconds that rounding each end up to a whole one can cost."""
    draw = random.Random(seed)
    link, worker = draw.uniform(0.3e9, 9e9), draw.uniform(0.3e9, 9e9)
    n = 60
    loads = sorted((draw.randrange(20_000), draw.randrange(1, 4000)) for _ in range(n))
    sim = executor(link, worker)
    ends = {}
    for i, (at, n_bytes) in enumerate(loads):
        while sim.now_ns() < at:
            ends.update((s.op.op_id, s.end_ns) for s in sim.wait(at))
        sim.submit([load(i, n_bytes, worker=i)])
    while found := sim.wait(None):
        ends.update((s.op.op_id, s.end_ns) for s in found)
    exact = reference(loads, Fraction(link) / 10**9, Fraction(worker) / 10**9)
    for i in range(n):
        assert 0 <= ends[i] - exact[i] < n, f"load {i} of seed {seed}"
    assert sum(ends[i] - exact[i] for i in range(n)) / n < 3


def test_long_transfers_do_not_drift():
    """A day at a rate that is no whole number of bytes per nanosecond."""
    n_bytes = 7_000_000_000 * 86_400
    assert run(executor(link=7e9), load(0, n_bytes)) == [(0, 0, 86_400 * 10**9)]
    half = [load(i, n_bytes // 2, i) for i in range(2)]
    assert run(executor(link=7e9), *half)[-1][2] == 86_400 * 10**9
