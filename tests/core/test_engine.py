"""The engine alone and on the simulator: batching, capacity, failed reads, blindness."""

from __future__ import annotations

import pytest
from cachetune.core.block_pool import BlockPool
from cachetune.core.chunk_index import ChunkIndex
from cachetune.core.engine import DEPTH, Engine
from cachetune.core.errors import CapacityError, InvariantViolation
from cachetune.core.executor import serve
from cachetune.core.invariants import check
from cachetune.core.ops import Op, Outcome, Span
from cachetune.core.plan import RatioRule, ReusePlan
from cachetune.core.timeline import Timeline
from cachetune.core.workload import Request, Workload
from cachetune.simulator.executor import SimExecutor
from support import make_entry, make_index, make_model, make_profile, make_workload, timetable

MODEL = make_model()
PLAN = ReusePlan(rules=(RatioRule(ratios=(0.25,)),), layer_group=4)
FULL = PLAN.replace(policy="full_recompute")


def engine_for(
    workload: Workload,
    plan: ReusePlan = PLAN,
    index: ChunkIndex | None = None,
    n_blocks: int = 1000,
) -> Engine:
    index = make_index(workload) if index is None else index
    return Engine(workload, MODEL, plan, index, BlockPool(n_blocks))


def run(engine: Engine, outcomes: dict[int, Outcome] | None = None) -> Timeline:
    executor = SimExecutor(make_profile(), outcomes=outcomes)
    timeline = serve(engine.workload, engine, executor)
    check(timeline, engine.workload, idle_ns=0)
    assert engine.n_open == 0
    assert engine.blocks.n_free == engine.blocks.n_blocks
    return timeline


def names(ops: list[Op]) -> list[str]:
    return [f"{op.kind}{''.join(str(r) for r in op.request_ids)}" for op in ops]


def ended(op: Op, outcome: Outcome | None = None) -> Span:
    return Span(op, op.op_id, 0, 0, 0, outcome or Outcome())


def test_one_request_as_a_timetable():
    """Load 2 x 4 layers x 8192 B at 1 B/ns after 10 ns; restore 5 + 8; prefill 100 + 4 x 10."""
    engine = engine_for(make_workload())
    assert timetable(run(engine)) == [
        (0, 0, 65546),
        (1, 65546, 65559),
        (2, 65559, 65699),
        (3, 65699, 65749),
        (4, 65749, 65773),
        (5, 65773, 65797),
    ]


def test_decode_steps_run_between_prefill_pieces():
    """Request 1 arrives while 0 decodes: a step waits for two pieces at most."""
    workload = make_workload([(), ("a",)], chunk_tokens=56, output_tokens=9, gap_ns=200)
    plan = FULL.replace(prefill_chunk_tokens=16)
    timeline = run(engine_for(workload, plan))
    letters = {"prefill": "P", "head": "H", "decode": "d"}
    order = [letters[s.op.kind] + "".join(map(str, s.op.request_ids)) for s in timeline.spans]
    assert " ".join(order) == "P0 H0 d0 P1 P1 d0 P1 P1 H1 d0 d01 d01 d01 d01 d01 d1 d1 d1"


def test_at_most_depth_pieces_are_queued():
    workload = make_workload([("a",), ("b",), ("c",)], gap_ns=0)
    engine = engine_for(workload, FULL)
    assert DEPTH == 2
    assert names(engine.on_arrival(workload.requests[0], 0)) == ["prefill0", "head0"]
    assert names(engine.on_arrival(workload.requests[1], 0)) == ["prefill1", "head1"]
    assert engine.on_arrival(workload.requests[2], 0) == []
    assert engine.n_open == 3


def test_kv_capacity_makes_requests_wait():
    """Each needs ceil(75 / 16) = 5 blocks: of 9, one request at a time."""
    workload = make_workload([("a",), ("b",), ("c",)], gap_ns=0)
    timeline = run(engine_for(workload, FULL, n_blocks=9))
    last_decode = {r: 0 for r in range(3)}
    for span in timeline.spans:
        for r in span.op.request_ids:
            last_decode[r] = max(last_decode[r], span.end_ns)
    starts = {s.op.request_ids[0]: s.start_ns for s in timeline.spans if s.op.kind == "prefill"}
    assert starts[1] >= last_decode[0] and starts[2] >= last_decode[1]
    two_at_once = run(engine_for(workload, FULL, n_blocks=10))
    assert two_at_once.makespan_ns < timeline.makespan_ns


def test_a_request_that_can_never_fit_is_refused():
    workload = make_workload([("a",)])
    with pytest.raises(CapacityError, match="75 tokens need 5 blocks, the pool has 4"):
        engine_for(workload, FULL, n_blocks=4).on_arrival(workload.requests[0], 0)


def test_max_num_seqs_limits_the_batch():
    workload = make_workload([("a",)] * 5, gap_ns=0, output_tokens=6)
    timeline = run(engine_for(workload, FULL.replace(max_num_seqs=2)))
    assert max(len(s.op.request_ids) for s in timeline.spans) == 2


def test_a_failed_chunk_is_computed_in_the_second_attempt():
    workload = make_workload([("a", "b", "c")])
    engine = engine_for(workload)
    timeline = run(engine, {0: Outcome(failed_chunks=(1,))})
    assert engine.n_fallbacks == 1
    loads = [(s.op.attempt, s.op.chunks) for s in timeline.spans if s.op.kind == "load"]
    assert loads == [(0, (0, 1, 2)), (1, (0, 2))]
    rows = [(s.op.attempt, s.op.n_tokens) for s in timeline.spans if s.op.kind == "prefill"]
    assert rows == [(0, 16 + 16 + 8), (1, 64 + 16 + 8)]
    assert [e is None for e in engine.index.lookup(("a", "b", "c"))] == [False, True, False]


def test_a_restart_goes_before_the_pieces_of_later_requests():
    """Request 1 has eleven pieces to compute; 0 comes back after the two that are queued."""
    tokens = {"a": 64, "b": 64, "long": 640}
    workload = make_workload([("a", "b"), ("long",)], chunk_tokens=tokens, gap_ns=0)
    index = make_index(workload)
    index.discard("long")
    engine = engine_for(workload, PLAN.replace(prefill_chunk_tokens=64), index)
    timeline = run(engine, {0: Outcome(failed_chunks=(1,))})
    heads = [(s.op.request_ids[0], s.op.attempt) for s in timeline.spans if s.op.kind == "head"]
    assert heads == [(0, 0), (0, 1), (1, 0)]
    assert engine.n_fallbacks == 1


def test_a_chunk_that_fails_twice_restarts_twice():
    """The exact entry fails first, the isolated one behind it second."""
    workload = make_workload([("a", "b")])
    index = make_index(workload)
    index.add(make_entry("b", chain=["a"]))
    engine = engine_for(workload, index=index)
    n_first = 4
    timeline = run(engine, {0: Outcome(failed_chunks=(1,)), n_first: Outcome(failed_chunks=(1,))})
    assert engine.n_fallbacks == 2
    assert {s.op.attempt for s in timeline.spans} == {0, 1, 2}


def test_an_early_end_frees_the_request():
    workload = make_workload([("a",)], output_tokens=9)
    engine = engine_for(workload, FULL)
    timeline = run(engine, {3: Outcome(ended=(0,))})
    assert [s.op.kind for s in timeline.spans] == ["prefill", "head", "decode", "decode"]


class Blind:
    """A request whose true output length nobody may read."""

    def __init__(self, request: Request) -> None:
        self._request = request

    def __getattr__(self, name: str) -> object:
        if name == "output_tokens":
            raise InvariantViolation("INV-7 a policy reads the output length")
        return getattr(self._request, name)


@pytest.mark.parametrize(
    "policy", ["cachetune", "cacheblend", "epic", "full_reuse", "prefix_cache"]
)
def test_no_policy_sees_the_output_length(policy: str):
    """INV-7: everything up to the head is decided, batched and admitted without it."""
    workload = make_workload([("a", "b"), ("b", "c")])
    engine = engine_for(workload, PLAN.replace(policy=policy, prefill_chunk_tokens=16))
    ops = engine.on_arrival(Blind(workload.requests[0]), 0)  # type: ignore[arg-type]
    while ops[0].kind != "head":
        ops += engine.on_done(ended(ops.pop(0)))
    with pytest.raises(InvariantViolation, match="INV-7"):
        engine.on_done(ended(ops[0]))


def test_ops_do_not_depend_on_the_output_length():
    """INV-7: until the shorter output ends, both runs submit the same ops."""
    short, long = (make_workload([("a", "b"), ("b",)], output_tokens=12) for _ in range(2))
    requests = tuple(r.replace(output_tokens=4) for r in short.requests)
    short = short.replace(requests=requests)
    ops = []
    for workload in (short, long):
        spans = sorted(run(engine_for(workload)).spans, key=lambda s: s.seq)
        ops.append([s.op for s in spans])
    n_same = ops[0].index(next(op for op in ops[0] if op.kind == "decode")) + 3
    assert ops[0][:n_same] == ops[1][:n_same]


def test_block_pool_keeps_its_sum():
    pool = BlockPool(4, block_tokens=16)
    pool.allocate(7, 33)
    assert (pool.n_free, pool.can_allocate(16), pool.can_allocate(17)) == (1, True, False)
    with pytest.raises(InvariantViolation, match="INV-4"):
        pool.allocate(8, 17)
    with pytest.raises(InvariantViolation, match="already held 3"):
        pool.allocate(7, 1)
    pool.free(7)
    pool.check_integrity()
    assert pool.n_free == 4


def test_slow_loads_are_few_while_others_are_under_way():
    """At three times the time, of 72 tokens: 24 may be loaded alone; behind another that computes
    56 and loads 16, (56 + 72 - 3 x 16) / 3 = 26; without a rho, all."""
    workload = make_workload([["a", "b", "c", "d"]] * 2, chunk_tokens=16, gap_ns=0)
    for rho, expected in ((3.0, [1, 1]), (0.5, [4, 4]), (None, [4, 4])):
        plan = ReusePlan(policy="full_reuse", rules=(RatioRule(rho=rho),))
        engine = engine_for(workload, plan)
        for request in workload.requests:
            engine.on_arrival(request, 0)
        decisions = [engine.decision_of(r.request_id) for r in workload.requests]
        assert [sum(c.is_loaded for c in d.chunks) for d in decisions] == expected
        run(engine_for(workload, plan))
    assert ReusePlan().fingerprint() == ReusePlan(rules=(RatioRule(rho=None),)).fingerprint()
    assert "rho" not in ReusePlan().model_dump_json()
