"""The conformance suite on the CPU executor, and what only a real executor can get wrong."""

from __future__ import annotations

import errno
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import pytest
from cachetune.core.block_pool import BlockPool
from cachetune.core.chunk_index import ChunkIndex
from cachetune.core.engine import Engine, schedule_of
from cachetune.core.executor import execute, serve
from cachetune.core.invariants import check
from cachetune.core.ops import COMPUTE, NOTHING, RESTORE, Op, Outcome, Schedule
from cachetune.core.plan import ReusePlan
from cachetune.runtime.executor import CpuExecutor
from cachetune.runtime.handlers import Handlers
from cachetune.runtime.runner import Runner
from cachetune.runtime.session import Session
from cachetune.simulator.executor import SimExecutor
from executors.conformance import *  # noqa: F403
from executors.conformance import PLAN, WORKLOAD, DecisionOf, Rig, drain
from support import make_index, make_model, make_op, make_profile

from ..runtime import model_cases

OP_S = 0.002
"""How long an op of the stub lasts: long beside what handing it over takes."""


class StubSession:
    """As much of a session as the executor sees."""

    failed = False

    def __init__(self, request_id: int, attempt: int) -> None:
        self.request_id = request_id
        self.attempt = attempt


class StubHandlers:
    """Ops that only last. `fail` maps an op id to what it raises."""

    def __init__(self, fail: dict[int, BaseException] | None = None, op_s: float = OP_S) -> None:
        self.fail = fail or {}
        self.op_s = op_s
        self.done: list[int] = []

    def _last(self, _: Any, op: Op) -> Outcome:
        time.sleep(self.op_s)
        if op.op_id in self.fail:
            raise self.fail[op.op_id]
        self.done.append(op.op_id)
        return NOTHING

    load = restore = select = prefill = head = _last

    def decode(self, sessions: Sequence[Any], op: Op) -> Outcome:
        assert [s.request_id for s in sessions] == list(op.request_ids)
        return self._last(sessions, op)


def stub_executor(handlers: StubHandlers) -> CpuExecutor:
    return CpuExecutor(
        cast(Handlers, handlers), lambda r, attempt: cast(Session, StubSession(r, attempt))
    )


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    loaded, _ = model_cases.make_twins("llama")
    with Runner(loaded, tmp_path_factory.mktemp("cpu"), model_cases.TIERS) as runner:
        yield runner


@pytest.fixture(params=["stub", "real"])
def rig(request: pytest.FixtureRequest, runner: Runner) -> Iterator[Rig]:
    made: list[CpuExecutor] = []
    requests = {r.request_id: r for r in WORKLOAD.requests}

    def index(plan: ReusePlan) -> ChunkIndex:
        runner.prepare(WORKLOAD, plan, "dram")
        return runner.index(plan)

    def executor(plan: ReusePlan, decision_of: DecisionOf) -> CpuExecutor:
        if request.param == "stub":
            made.append(stub_executor(StubHandlers()))
            return made[-1]

        def source(request_id: int, attempt: int) -> Session:
            wanted = requests[request_id]
            return runner._session(WORKLOAD, wanted, attempt, decision_of(request_id))

        handlers = Handlers(runner.transformer, runner.store, plan.request_bytes)
        made.append(CpuExecutor(handlers, source))
        return made[-1]

    yield Rig(runner.spec, index, executor)
    for one in made:
        one.close()
    assert not workers()


def workers() -> set[str]:
    """Streams whose threads live."""
    names = (COMPUTE, RESTORE, "io.")
    return {t.name for t in threading.enumerate() if t.name.startswith(names)}


def planned(plan: ReusePlan = PLAN) -> Schedule:
    """The fixed DAG of the first request on the synthetic model."""
    request, index = WORKLOAD.requests[0], make_index(WORKLOAD)
    return Schedule.of(schedule_of(WORKLOAD, request, make_model(), plan, index)[1])


def test_close_ends_the_workers_and_restores_the_interpreter() -> None:
    interval = sys.getswitchinterval()
    with stub_executor(StubHandlers()) as executor:
        execute(planned(), executor)
        assert workers() == {op.stream for op in planned().ops}
        assert sys.getswitchinterval() < interval
    assert not workers()
    assert sys.getswitchinterval() == interval


def test_a_worker_that_cannot_be_bound_works_unbound(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr("cachetune.runtime.executor.bind", refuse)
    with stub_executor(StubHandlers()) as executor:
        executor.submit([make_op(0)])
        spans = executor.wait(executor.now_ns() + 20_000_000_000)
    assert len(spans) == 1 and "whatever core is free" in caplog.text


def test_a_worker_that_fails_before_its_first_op_is_heard_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cachetune.runtime.executor.bind", lambda *_: 1 / 0)
    with stub_executor(StubHandlers()) as executor:
        executor.submit([make_op(0)])
        with pytest.raises(ZeroDivisionError):
            executor.wait(executor.now_ns() + 20_000_000_000)


def test_every_session_is_let_go_once() -> None:
    """When another attempt takes its place, when its request ends, when the executor is closed."""
    gone: list[tuple[int, int]] = []

    class Ends(StubHandlers):
        def decode(self, sessions: Sequence[Any], op: Op) -> Outcome:
            super().decode(sessions, op)
            return Outcome(ended=op.request_ids)

    executor = CpuExecutor(
        cast(Handlers, Ends()),
        lambda r, attempt: cast(Session, StubSession(r, attempt)),
        let_go=lambda s: gone.append((s.request_id, s.attempt)),
    )
    ops = [make_op(i, request_ids=(i,)) for i in range(3)]
    with executor:
        executor.submit(ops)
        drain(executor)
        executor.submit([make_op(3, request_ids=(1,), attempt=1)])
        executor.submit([make_op(4, "decode", request_ids=(0,))])
        drain(executor)
        assert gone == [(1, 0), (0, 0)]
    executor.close()
    assert gone[:2] == [(1, 0), (0, 0)] and sorted(gone[2:]) == [(1, 1), (2, 0)]


def test_close_drops_what_is_queued() -> None:
    handlers = StubHandlers(op_s=0.05)
    executor = stub_executor(handlers)
    ops = [make_op(i) for i in range(100)]
    executor.submit(ops)
    time.sleep(0.01)
    started = time.perf_counter()
    executor.close()
    assert time.perf_counter() - started < 2
    assert len(handlers.done) <= 2
    assert not workers()


@pytest.mark.parametrize("failing", range(len(planned().ops)))
def test_an_error_in_any_op_reaches_the_caller(failing: int) -> None:
    """Ops that wait for the failed one, on whatever stream, are let go."""
    schedule = planned()
    error = RuntimeError(f"op {failing}")
    with (
        stub_executor(StubHandlers({schedule.ops[failing].op_id: error})) as executor,
        pytest.raises(RuntimeError, match=f"op {failing}"),
    ):
        execute(schedule, executor)
    assert not workers()


def test_an_error_in_serve_reaches_the_caller() -> None:
    engine = Engine(WORKLOAD, make_model(), PLAN, make_index(WORKLOAD), BlockPool(1000))
    with (
        stub_executor(StubHandlers({5: ZeroDivisionError("five")}, op_s=0)) as executor,
        pytest.raises(ZeroDivisionError, match="five"),
    ):
        serve(WORKLOAD, engine, executor)
    assert not workers()


def test_an_error_of_the_session_source_reaches_the_caller() -> None:
    def source(request_id: int, attempt: int) -> Session:
        raise KeyError(request_id)

    with (
        CpuExecutor(cast(Handlers, StubHandlers()), source) as executor,
        pytest.raises(KeyError),
    ):
        execute(planned(), executor)


def test_streams_overlap() -> None:
    """Two independent ops on two streams take the time of one."""
    handlers = StubHandlers(op_s=0.1)
    with stub_executor(handlers) as executor:
        executor.warm(["a", "b"])
        spans = execute(Schedule.of([make_op(0, stream="a"), make_op(1, stream="b")]), executor)
    first, second = spans.spans
    assert second.start_ns < first.end_ns


def test_a_failed_attempt_s_ops_pass_without_work() -> None:
    handlers = StubHandlers(op_s=0)
    sessions: list[StubSession] = []

    def source(request_id: int, attempt: int) -> Session:
        sessions.append(StubSession(request_id, attempt))
        sessions[-1].failed = attempt == 0
        return cast(Session, sessions[-1])

    with CpuExecutor(cast(Handlers, handlers), source) as executor:
        executor.submit([make_op(0, "load"), make_op(1, "prefill")])
        assert len(drain(executor)) == 2
        assert handlers.done == []
        executor.submit([make_op(2, "load", attempt=1)])
        assert [s.op.op_id for s in drain(executor)] == [2]
        assert handlers.done == [2]
    assert [s.attempt for s in sessions] == [0, 1]


POLICIES = ("full_recompute", "prefix_cache", "full_reuse", "cacheblend", "epic", "cachetune")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "knobs",
    [{}, {"load_order": "chunk"}, {"restore_stream": "compute", "prefill_chunk_tokens": 16}],
    ids=["layer", "chunk", "compute"],
)
def test_invariants_hold_on_measured_timelines(rig: Rig, policy: str, knobs: dict[str, Any]):
    plan = PLAN.replace(policy=policy, layer_group=1, n_io_workers=2, **knobs)
    schedule, executor = rig.planned(plan)
    check(execute(schedule, executor), schedule=schedule)
    engine, executor = rig.served(WORKLOAD, plan)
    check(serve(WORKLOAD, engine, executor), WORKLOAD, idle_ns=50_000_000)


@pytest.mark.parametrize("policy", POLICIES)
def test_both_executors_run_the_same_ops(rig: Rig, policy: str):
    """Parity: one schedule, joined by op id; streams, order in them, bytes and rows are equal."""
    schedule, executor = rig.planned(PLAN.replace(policy=policy, layer_group=1, n_io_workers=2))
    real = execute(schedule, executor)
    simulated = execute(schedule, SimExecutor(make_profile(model=rig.model), seed=1))
    by_id = [{s.op.op_id: s.op for s in timeline.spans} for timeline in (real, simulated)]
    assert by_id[0] == by_id[1]
    streams = [{k: [s.op for s in v] for k, v in t.by_stream().items()} for t in (real, simulated)]
    assert streams[0] == streams[1]
