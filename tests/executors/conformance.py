"""What every executor does, simulated or real: one suite, run by `test_*.py` beside it.

Durations are the executor's own, so nothing here asserts a number of nanoseconds. A module that
imports these tests provides a fixture `make_executor`: a function from (workload, plan) to a fresh
executor able to run that workload's ops.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cachetune.core.block_pool import BlockPool
from cachetune.core.engine import Engine, schedule_of
from cachetune.core.executor import Executor, execute, serve
from cachetune.core.invariants import check
from cachetune.core.ops import COMPUTE, RESTORE, Op, Schedule, Span
from cachetune.core.plan import RatioRule, ReusePlan
from cachetune.core.workload import Workload
from support import make_index, make_model, make_workload

MakeExecutor = Callable[[Workload, ReusePlan], Executor]

MODEL = make_model()
WORKLOAD = make_workload(
    [("a", "b"), ("b", "c"), ("c", "a")], suffix_tokens=8, output_tokens=3, gap_ns=50_000
)
PLAN = ReusePlan(rules=(RatioRule(ratios=(0.25,)),), look_ahead=1)


def schedule(plan: ReusePlan = PLAN, request: int = 0) -> Schedule:
    """The fixed DAG of one request of `WORKLOAD`."""
    index = make_index(WORKLOAD, model=MODEL)
    _, ops = schedule_of(WORKLOAD, WORKLOAD.requests[request], MODEL, plan, index)
    return Schedule.of(ops)


def by_id(spans: list[Span] | tuple[Span, ...]) -> dict[int, Span]:
    return {s.op.op_id: s for s in spans}


def drain(executor: Executor) -> list[Span]:
    spans = []
    while found := executor.wait(None):
        spans += found
    return spans


def test_every_op_has_one_span(make_executor: MakeExecutor) -> None:
    planned = schedule()
    timeline = execute(planned, make_executor(WORKLOAD, PLAN))
    assert sorted(s.op.op_id for s in timeline.spans) == [op.op_id for op in planned.ops]
    assert all(s.op is not None and s.op in planned.ops for s in timeline.spans)


def test_submit_start_end_are_in_order(make_executor: MakeExecutor) -> None:
    timeline = execute(schedule(), make_executor(WORKLOAD, PLAN))
    for span in timeline.spans:
        assert timeline.start_ns <= span.submit_ns <= span.start_ns <= span.end_ns
    ends = [s.end_ns for s in timeline.spans]
    assert ends == sorted(ends)


def test_seq_counts_submissions_over_all_streams(make_executor: MakeExecutor) -> None:
    planned = schedule()
    spans = execute(planned, make_executor(WORKLOAD, PLAN)).spans
    order = [s.op.op_id for s in sorted(spans, key=lambda s: s.seq)]
    assert order == [op.op_id for op in planned.ops]
    assert len({s.seq for s in spans}) == len(spans)


def test_no_op_starts_before_its_deps_end(make_executor: MakeExecutor) -> None:
    spans = by_id(execute(schedule(), make_executor(WORKLOAD, PLAN)).spans)
    pairs = [(span, spans[d]) for span in spans.values() for d in span.op.deps]
    assert pairs
    for span, before in pairs:
        assert span.start_ns >= before.end_ns


def test_a_later_independent_op_does_not_overtake(make_executor: MakeExecutor) -> None:
    """On the restore stream, 2 waits for the load 0 on its own stream; 3 waits for nothing.

    3 was submitted last, so it starts last, though its stream idles while 2 waits.
    """
    load, wait, free = _three_ops()
    spans = by_id(execute(Schedule.of([load, wait, free]), make_executor(WORKLOAD, PLAN)).spans)
    assert spans[wait.op_id].start_ns >= spans[load.op_id].end_ns
    assert spans[free.op_id].start_ns >= spans[wait.op_id].end_ns


def _three_ops() -> tuple[Op, Op, Op]:
    """A load, a restore that waits for it, and the suffix's rows, all but the load on compute."""
    plan = PLAN.replace(restore_stream="compute", layer_group=MODEL.n_layers)
    load, restore, prefill, _ = schedule(plan).ops
    assert (load.kind, restore.kind, prefill.kind) == ("load", "restore", "prefill")
    assert restore.stream == prefill.stream == COMPUTE
    alone = Op(**{**_fields(prefill), "deps": ()})
    return load, restore, alone


def _fields(op: Op) -> dict[str, object]:
    return {name: getattr(op, name) for name in op.__slots__}


def test_wait_returns_nothing_when_nothing_is_under_way(make_executor: MakeExecutor) -> None:
    executor = make_executor(WORKLOAD, PLAN)
    assert executor.wait(None) == []
    execute(schedule(), executor)
    assert executor.wait(None) == []


def test_wait_returns_when_the_clock_reaches_until(make_executor: MakeExecutor) -> None:
    executor = make_executor(WORKLOAD, PLAN)
    until = executor.now_ns() + 2_000_000
    assert executor.wait(until) == []
    assert executor.now_ns() >= until
    assert executor.wait(until - 1_000_000) == []


def test_wait_returns_at_the_earliest_end(make_executor: MakeExecutor) -> None:
    executor = make_executor(WORKLOAD, PLAN)
    planned = schedule()
    executor.submit(planned.ops)
    first = executor.wait(executor.now_ns() + 60_000_000_000)
    assert first and len(first) < len(planned.ops)
    rest = drain(executor)
    assert sorted(by_id(first + rest)) == [op.op_id for op in planned.ops]
    assert max(s.end_ns for s in first) <= min(s.end_ns for s in rest)


def test_ops_can_be_submitted_in_parts(make_executor: MakeExecutor) -> None:
    """A dependency may have ended long before the op that names it is submitted."""
    executor = make_executor(WORKLOAD, PLAN)
    spans = []
    for op in schedule().ops:
        executor.submit([op])
        spans += drain(executor)
    assert [s.op.op_id for s in spans] == [op.op_id for op in schedule().ops]
    assert [s.seq for s in spans] == sorted(s.seq for s in spans)


def test_two_streams_overlap_or_take_turns_but_each_is_one_worker(
    make_executor: MakeExecutor,
) -> None:
    timeline = execute(schedule(), make_executor(WORKLOAD, PLAN))
    streams = timeline.by_stream()
    assert {f"0:{COMPUTE}", f"0:{RESTORE}", "0:io.dram.0"} == set(streams)
    for spans in streams.values():
        for before, after in zip(spans, spans[1:], strict=False):
            assert before.end_ns <= after.start_ns


@pytest.mark.parametrize("policy", ["full_recompute", "cachetune", "cacheblend", "epic"])
def test_execute_keeps_the_invariants(make_executor: MakeExecutor, policy: str) -> None:
    plan = PLAN.replace(policy=policy)
    planned = schedule(plan)
    check(execute(planned, make_executor(WORKLOAD, plan)), schedule=planned)


@pytest.mark.parametrize("policy", ["full_recompute", "cachetune", "cacheblend", "full_reuse"])
def test_serve_ends_every_request(make_executor: MakeExecutor, policy: str) -> None:
    plan = PLAN.replace(policy=policy, prefill_chunk_tokens=64, n_io_workers=2)
    blocks = BlockPool(1000)
    engine = Engine(WORKLOAD, MODEL, plan, make_index(WORKLOAD, model=MODEL), blocks)
    timeline = serve(WORKLOAD, engine, make_executor(WORKLOAD, plan))
    check(timeline, WORKLOAD)
    assert engine.n_open == 0
    assert blocks.n_free == blocks.n_blocks
    assert engine.n_fallbacks == 0
