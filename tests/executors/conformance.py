"""What every executor does, simulated or real: one suite, run by each `test_*.py` beside it.

Durations are the executor's own, so nothing here asserts a number of nanoseconds. A module that
imports these tests provides the fixture `rig`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
from cachetune.core.block_pool import BlockPool
from cachetune.core.chunk_index import ChunkIndex
from cachetune.core.decision import ReuseDecision
from cachetune.core.engine import Engine, schedule_of
from cachetune.core.executor import Executor, execute, serve
from cachetune.core.generators import rag_workload
from cachetune.core.invariants import check
from cachetune.core.model_spec import ModelSpec
from cachetune.core.ops import COMPUTE, Schedule, Span
from cachetune.core.plan import RatioRule, ReusePlan
from cachetune.core.workload import Workload

WORKLOAD = rag_workload(
    "conformance",
    n_requests=3,
    n_contents=3,
    chunk_tokens=64,
    chunks_per_request=2,
    suffix_tokens=8,
    output_tokens=3,
    spacing_s=5e-5,
    vocab_size=64,
)
"""Three requests of two passages; token ids below 64, content ids are their hashes."""

PLAN = ReusePlan(rules=(RatioRule(ratios=(0.25,)),), look_ahead=1)

DecisionOf = Callable[[int], ReuseDecision]


@dataclass(frozen=True)
class Rig:
    """One kind of executor, with everything in place to run `WORKLOAD`."""

    model: ModelSpec
    index: Callable[[ReusePlan], ChunkIndex]
    """All chunks of `WORKLOAD`, isolated, in the order that the plan asks for."""
    executor: Callable[[ReusePlan, DecisionOf], Executor]
    """A fresh executor; the second argument is the decision of a request being prefilled."""

    def planned(self, plan: ReusePlan = PLAN) -> tuple[Schedule, Executor]:
        """The fixed DAG of the first request, and an executor that can run it."""
        request = WORKLOAD.requests[0]
        index = self.index(plan)
        decision, ops = schedule_of(WORKLOAD, request, self.model, plan, index)
        return Schedule.of(ops), self.executor(plan, lambda _: decision)

    def served(self, workload: Workload, plan: ReusePlan) -> tuple[Engine, Executor]:
        """An engine for the closed loop, and an executor that can follow it."""
        engine = Engine(workload, self.model, plan, self.index(plan), BlockPool(1000))
        return engine, self.executor(plan, engine.decision_of)


def by_id(spans: Sequence[Span]) -> dict[int, Span]:
    return {s.op.op_id: s for s in spans}


def drain(executor: Executor) -> list[Span]:
    spans = []
    while found := executor.wait(None):
        spans += found
    return spans


def test_every_op_has_one_span(rig: Rig):
    schedule, executor = rig.planned()
    spans = execute(schedule, executor).spans
    assert sorted((s.op for s in spans), key=lambda op: op.op_id) == list(schedule.ops)


def test_submit_start_end_are_in_order(rig: Rig):
    schedule, executor = rig.planned()
    timeline = execute(schedule, executor)
    for span in timeline.spans:
        assert timeline.start_ns <= span.submit_ns <= span.start_ns <= span.end_ns
    assert timeline.end_ns <= executor.now_ns()


def test_seq_counts_submissions_over_all_streams(rig: Rig):
    schedule, executor = rig.planned()
    spans = sorted(execute(schedule, executor).spans, key=lambda s: s.seq)
    assert [s.op.op_id for s in spans] == [op.op_id for op in schedule.ops]
    assert len({s.seq for s in spans}) == len(spans)


def test_no_op_starts_before_its_deps_end(rig: Rig):
    schedule, executor = rig.planned()
    spans = by_id(execute(schedule, executor).spans)
    pairs = [(span, spans[dep]) for span in spans.values() for dep in span.op.deps]
    assert len(pairs) >= len(schedule.ops) // 2
    for span, before in pairs:
        assert span.start_ns >= before.end_ns


def test_each_stream_is_one_worker_in_submission_order(rig: Rig):
    schedule, executor = rig.planned()
    streams = execute(schedule, executor).by_stream()
    assert set(streams) == {f"{op.device}:{op.stream}" for op in schedule.ops}
    for spans in streams.values():
        for before, after in zip(spans, spans[1:], strict=False):
            assert before.end_ns <= after.start_ns


def test_a_later_independent_op_does_not_overtake(rig: Rig):
    """On compute, a restore waits for a load of another stream; rows after it wait for nothing.

    The rows were submitted last, so they start last, though compute idles meanwhile.
    """
    schedule, executor = rig.planned(
        PLAN.replace(restore_stream="compute", layer_group=rig.model.n_layers)
    )
    load, restore, rows = schedule.ops[:3]
    assert (load.kind, restore.kind, rows.kind) == ("load", "restore", "prefill")
    assert load.stream != restore.stream == rows.stream == COMPUTE
    free = replace(rows, deps=())
    spans = by_id(execute(Schedule.of([load, restore, free]), executor).spans)
    assert spans[restore.op_id].start_ns >= spans[load.op_id].end_ns
    assert spans[free.op_id].start_ns >= spans[restore.op_id].end_ns


def test_wait_returns_nothing_when_nothing_is_under_way(rig: Rig):
    schedule, executor = rig.planned()
    assert executor.wait(None) == []
    execute(schedule, executor)
    assert executor.wait(None) == []


def test_wait_returns_when_the_clock_reaches_until(rig: Rig):
    _, executor = rig.planned()
    until = executor.now_ns() + 2_000_000
    assert executor.wait(until) == []
    assert executor.now_ns() >= until
    assert executor.wait(until - 1_000_000) == []


def test_wait_does_not_wait_for_until_once_something_ends(rig: Rig):
    schedule, executor = rig.planned()
    executor.submit(schedule.ops)
    until = executor.now_ns() + 3_600 * 10**9
    spans = executor.wait(until)
    assert spans
    assert executor.now_ns() < until
    spans += drain(executor)
    assert sorted(by_id(spans)) == [op.op_id for op in schedule.ops]


def test_spans_of_one_wait_are_in_end_order(rig: Rig):
    schedule, executor = rig.planned()
    executor.submit(schedule.ops)
    while spans := executor.wait(None):
        ends = [s.end_ns for s in spans]
        assert ends == sorted(ends)


def test_ops_can_be_submitted_one_by_one(rig: Rig):
    """A dependency may have ended long before the op that names it is submitted."""
    schedule, executor = rig.planned()
    spans = []
    for op in schedule.ops:
        executor.submit([op])
        spans += drain(executor)
    assert [s.op.op_id for s in spans] == [op.op_id for op in schedule.ops]
    assert [s.seq for s in spans] == sorted(s.seq for s in spans)


@pytest.mark.parametrize("policy", ["full_recompute", "cachetune", "cacheblend", "epic"])
def test_execute_keeps_the_invariants(rig: Rig, policy: str):
    schedule, executor = rig.planned(PLAN.replace(policy=policy))
    check(execute(schedule, executor), schedule=schedule)


@pytest.mark.parametrize("policy", ["full_recompute", "cachetune", "cacheblend", "full_reuse"])
def test_serve_ends_every_request(rig: Rig, policy: str):
    plan = PLAN.replace(policy=policy, prefill_chunk_tokens=64, n_io_workers=2)
    engine, executor = rig.served(WORKLOAD, plan)
    check(serve(WORKLOAD, engine, executor), WORKLOAD)
    assert (engine.n_open, engine.n_fallbacks) == (0, 0)
    assert engine.blocks.n_free == engine.blocks.n_blocks
