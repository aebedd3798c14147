"""In-order streams as timetables: (op, start, end) in nanoseconds, in order of ending."""

from __future__ import annotations

import pytest
from cachetune.core.errors import InvariantViolation
from cachetune.core.executor import execute
from cachetune.core.ops import Op, Outcome, Schedule
from cachetune.simulator.executor import SimExecutor
from support import NS, make_op, make_profile, timetable

PROFILE = make_profile(coefficients_s={"select.op": 0.0})
SLOW_DISPATCH = make_profile(coefficients_s={"select.op": 0.0, "dispatch.gap": 3 * NS})


def work(op_id: int, ns: int, stream: str = "compute", *deps: int, device: int = 0) -> Op:
    """An op that takes `ns` nanoseconds."""
    return make_op(op_id, "select", stream, n_tokens=ns, deps=deps, device=device)


def run(*ops: Op, executor: SimExecutor | None = None) -> list[tuple[int, int, int]]:
    return timetable(execute(Schedule.of(ops), executor or SimExecutor(PROFILE)))


def test_a_later_op_does_not_overtake_one_that_waits():
    """2 needs nothing and its stream is idle from 0 to 100, but 1 came before it."""
    assert run(work(0, 100, "io"), work(1, 20, "compute", 0), work(2, 50, "compute")) == [
        (0, 0, 100),
        (1, 100, 120),
        (2, 120, 170),
    ]


def test_streams_run_side_by_side():
    assert run(work(0, 30, "a"), work(1, 10, "b"), work(2, 10, "b"), work(3, 5, "a")) == [
        (1, 0, 10),
        (2, 10, 20),
        (0, 0, 30),
        (3, 30, 35),
    ]


def test_a_diamond_waits_for_its_slower_side():
    ops = work(0, 10, "a"), work(1, 30, "b", 0), work(2, 5, "c", 0), work(3, 1, "a", 1, 2)
    assert run(*ops) == [(0, 0, 10), (2, 10, 15), (1, 10, 40), (3, 40, 41)]


def test_the_same_name_on_another_device_is_another_stream():
    assert run(work(0, 9), work(1, 9, device=1)) == [(0, 0, 9), (1, 0, 9)]


def test_each_op_waits_for_the_dispatch_gap():
    ops = work(0, 10), work(1, 10), work(2, 10, "io", 0)
    assert run(*ops, executor=SimExecutor(SLOW_DISPATCH)) == [
        (0, 3, 13),
        (1, 16, 26),
        (2, 16, 26),
    ]


def test_ops_of_no_length_end_at_once_in_order():
    assert run(work(0, 0), work(1, 0, "io", 0), work(2, 0, "compute", 1)) == [
        (0, 0, 0),
        (1, 0, 0),
        (2, 0, 0),
    ]


def test_wait_returns_all_that_end_in_one_nanosecond():
    executor = SimExecutor(PROFILE)
    executor.submit([work(0, 5, "a"), work(1, 5, "b"), work(2, 0, "b"), work(3, 6, "c")])
    waits = [timetable(executor.wait(None)) for _ in range(3)]
    assert waits == [[(0, 0, 5), (1, 0, 5), (2, 5, 5)], [(3, 0, 6)], []]


def test_wait_stops_at_until_but_not_before_what_ends_there():
    executor = SimExecutor(PROFILE)
    executor.submit([work(0, 10)])
    steps = [(until, timetable(executor.wait(until)), executor.now_ns()) for until in (9, 10, 12)]
    assert steps == [(9, [], 9), (10, [(0, 0, 10)], 10), (12, [], 12)]
    executor.submit([work(1, 4)])
    assert (executor.wait(12), executor.now_ns()) == ([], 12)
    assert timetable(executor.wait(None)) == [(1, 12, 16)]


def test_late_ops_keep_their_submission_time():
    executor = SimExecutor(PROFILE)
    executor.submit([work(0, 10)])
    executor.wait(4)
    executor.submit([work(1, 1, "compute", 0)])
    executor.wait(None)
    (span,) = executor.wait(None)
    assert (span.seq, span.submit_ns, span.start_ns, span.end_ns) == (1, 4, 10, 11)


def test_recorded_outcomes_are_replayed():
    found = {1: Outcome(failed_chunks=(4,))}
    executor = SimExecutor(PROFILE, outcomes=found)
    spans = execute(Schedule.of([work(0, 1), work(1, 1)]), executor).spans
    assert [s.outcome for s in spans] == [Outcome(), found[1]]


def test_what_cannot_be_submitted():
    executor = SimExecutor(PROFILE)
    executor.submit([work(0, 1)])
    with pytest.raises(InvariantViolation, match="0 comes twice"):
        executor.submit([work(0, 1)])
    with pytest.raises(InvariantViolation, match="INV-3 op 2 waits for 1"):
        executor.submit([work(2, 1, "compute", 1)])
