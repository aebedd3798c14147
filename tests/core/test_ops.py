"""Ops, schedules and the timeline they leave."""

from __future__ import annotations

import pytest
from cachetune.core.errors import InvariantViolation
from cachetune.core.ops import Schedule, Span, io_stream
from cachetune.core.timeline import Timeline
from support import make_op


def test_schedule_keeps_submission_order():
    ops = [make_op(3), make_op(1, deps=(3,)), make_op(2, deps=(3, 1))]
    assert [op.op_id for op in Schedule.of(ops).ops] == [3, 1, 2]


def test_schedule_refuses_a_repeated_id():
    with pytest.raises(InvariantViolation, match="5 comes twice"):
        Schedule.of([make_op(5), make_op(5)])


def test_schedule_refuses_a_dependency_that_comes_later():
    with pytest.raises(InvariantViolation, match=r"op 0 waits for \[1\]"):
        Schedule.of([make_op(0, deps=(1,)), make_op(1)])


def test_io_streams_are_named_by_tier_and_worker():
    assert io_stream("disk", 2) == "io.disk.2"


def test_op_counts_layers():
    assert make_op(0, layer_start=2, layer_stop=5).n_layers == 3


def test_timeline_ends_with_its_last_span():
    spans = (Span(make_op(1), 1, 0, 30, 70), Span(make_op(0, stream="io"), 0, 0, 10, 90))
    timeline = Timeline(spans, start_ns=5, requests=())
    assert (timeline.end_ns, timeline.makespan_ns) == (90, 85)
    assert Timeline((), 5, ()).makespan_ns == 0


def test_streams_are_listed_in_submission_order():
    spans = tuple(Span(make_op(i), 9 - i, 0, 0, 0) for i in range(3))
    other = Span(make_op(7, device=1), 1, 0, 0, 0)
    streams = Timeline((*spans, other), 0, ()).by_stream()
    ids = {name: [s.op.op_id for s in found] for name, found in streams.items()}
    assert ids == {"0:compute": [2, 1, 0], "1:compute": [7]}
