"""Each invariant: a timeline that keeps it, and one forged span that breaks it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from cachetune.core.block_pool import BlockPool
from cachetune.core.engine import Engine, schedule_of
from cachetune.core.errors import InvariantViolation
from cachetune.core.executor import execute, serve
from cachetune.core.invariants import INVARIANTS, check
from cachetune.core.ops import Outcome, Schedule, Span
from cachetune.core.plan import RatioRule, ReusePlan
from cachetune.core.timeline import Timeline
from cachetune.simulator.executor import SimExecutor
from support import make_index, make_model, make_profile, make_workload

MODEL = make_model()
WORKLOAD = make_workload([("a", "b"), ("b", "a")], gap_ns=10)
PLAN = ReusePlan(rules=(RatioRule(ratios=(0.25,)),), layer_group=2)


def served() -> Timeline:
    engine = Engine(WORKLOAD, MODEL, PLAN, make_index(WORKLOAD), BlockPool(100))
    return serve(WORKLOAD, engine, SimExecutor(make_profile()))


def replayed() -> tuple[Timeline, Schedule]:
    _, ops = schedule_of(WORKLOAD, WORKLOAD.requests[0], MODEL, PLAN, make_index(WORKLOAD))
    schedule = Schedule.of(ops)
    return execute(schedule, SimExecutor(make_profile())), schedule


def forged(timeline: Timeline, pick: Callable[[Span], bool], **changes: object) -> Timeline:
    """The timeline with the first span that `pick` wants changed."""
    spans = list(timeline.spans)
    at = next(i for i, s in enumerate(spans) if pick(s))
    spans[at] = replace(spans[at], **changes)  # type: ignore[arg-type]
    return replace(timeline, spans=tuple(spans))


def without(timeline: Timeline, pick: Callable[[Span], bool]) -> Timeline:
    return replace(timeline, spans=tuple(s for s in timeline.spans if not pick(s)))


def is_kind(kind: str) -> Callable[[Span], bool]:
    return lambda span: span.op.kind == kind


def breaks(timeline: Timeline, message: str, schedule: Schedule | None = None) -> None:
    with pytest.raises(InvariantViolation, match=message):
        check(timeline, WORKLOAD if timeline.requests else None, schedule, idle_ns=0)


def test_good_timelines_pass():
    check(served(), WORKLOAD, idle_ns=0)
    check(served(), idle_ns=0)
    timeline, schedule = replayed()
    check(timeline, schedule=schedule)
    check(Timeline((), 0, ()))


def test_all_ten_are_listed_with_their_place():
    assert [i.number for i in INVARIANTS] == list(range(1, 11))
    assert all(i.statement and i.checked_in for i in INVARIANTS)


def test_inv_1_missing_token():
    last = max(s.op.op_id for s in served().spans)
    breaks(
        without(served(), lambda s: s.op.op_id == last), "INV-1 .* made 2 tokens, it asked for 3"
    )


def test_inv_1_missing_and_repeated_first_token():
    breaks(without(served(), is_kind("head")), "INV-1 request 0 has 0 first tokens")
    head = next(s for s in served().spans if s.op.kind == "head")
    again = replace(head, op=replace(head.op, op_id=999), seq=999)
    spans = (*served().spans, again)
    breaks(replace(served(), spans=spans), "INV-1 request 0 has 2 first tokens")


def test_inv_1_an_announced_early_end_may_be_short():
    last = max((s for s in served().spans if s.op.kind == "decode"), key=lambda s: s.seq)
    early = forged(served(), is_kind("head"), outcome=Outcome(ended=last.op.request_ids))
    check(without(early, lambda s: s is not last and s.op == last.op), WORKLOAD)


def test_inv_1_stranger():
    alone = WORKLOAD.replace(requests=WORKLOAD.requests[:1])
    with pytest.raises(InvariantViolation, match=r"INV-1 spans name the requests \[1\]"):
        check(served(), alone)


def test_inv_2_overlap():
    head = next(s for s in served().spans if s.op.kind == "head")
    start = head.start_ns - 1
    breaks(forged(served(), is_kind("head"), start_ns=start), "INV-2 stream 0:compute")


def test_inv_2_order_of_submission():
    first, second = [s for s in served().spans if s.op.kind == "decode"][:2]
    swapped = forged(served(), lambda s: s is first or s.op == first.op, seq=second.seq)
    breaks(swapped, f"both have seq {second.seq}")
    late = forged(served(), lambda s: s.op == first.op, seq=10_000)
    breaks(late, "INV-2 stream 0:compute: op .*seq 10000")


def test_inv_2_clock():
    breaks(forged(served(), is_kind("load"), submit_ns=1 << 60), "INV-2 .* must not decrease")


def test_inv_3_dependency():
    load = next(s for s in served().spans if s.op.kind == "load")
    late = forged(served(), is_kind("load"), end_ns=load.end_ns + 1)
    breaks(without(late, lambda s: s.op.kind == "load" and s.op.op_id != load.op.op_id), "INV-3")
    timeline, _ = replayed()
    breaks(without(timeline, is_kind("load")), "INV-3 op 1 .* dependency 0 never ends")


def undone(timeline: Timeline) -> Timeline:
    """The same spans with every dependency forgotten, so that only INV-5 can object."""
    spans = (replace(s, op=replace(s.op, deps=())) for s in timeline.spans)
    return replace(timeline, spans=tuple(spans))


def test_inv_5_restored_before_loaded():
    timeline = undone(replayed()[0])
    load = next(s for s in timeline.spans if s.op.kind == "load")
    early = forged(timeline, is_kind("restore"), start_ns=load.end_ns - 1)
    breaks(early, "INV-5 .* restore op 1 .* load op 0 that it reads ends")
    missing = without(timeline, lambda s: s is load)
    breaks(missing, r"INV-5 .* restores 2 layers of chunk 0, of which \[0, 1\] were never loaded")


def test_inv_5_computed_before_restored():
    timeline = undone(replayed()[0])
    restore = next(s for s in timeline.spans if s.op.kind == "restore")
    early = forged(timeline, is_kind("prefill"), start_ns=restore.end_ns - 1)
    breaks(early, "INV-5 .* prefill op 2")


def test_inv_5_head_before_the_last_layers():
    timeline = undone(replayed()[0])
    last = [s for s in timeline.spans if s.op.kind == "prefill"][-1]
    moved = forged(timeline, is_kind("head"), start_ns=last.end_ns - 1)
    other = forged(moved, is_kind("head"), op=replace(timeline.spans[-1].op, stream="other"))
    breaks(other, "INV-5 .* head op 6")


def test_inv_8_idle():
    timeline = served()
    gap = replace(timeline, start_ns=timeline.start_ns - 5)
    breaks(gap, r"INV-8 nothing is under way from -5 to 0 ns")
    check(gap, WORKLOAD, idle_ns=5)


def test_inv_9_bytes():
    timeline, schedule = replayed()
    load = timeline.spans[0].op
    half = forged(timeline, is_kind("load"), op=replace(load, n_bytes=load.n_bytes // 2))
    breaks(half, "INV-9", schedule)
    breaks(without(timeline, is_kind("head")), "INV-9 6 spans", schedule)
    twice = replace(timeline, spans=(*timeline.spans, replace(timeline.spans[-1], seq=77)))
    spans = forged(twice, lambda s: s.seq == 77, start_ns=1 << 40, end_ns=1 << 40)
    breaks(spans, r"INV-9 the ops \[6\] have more than one span")
