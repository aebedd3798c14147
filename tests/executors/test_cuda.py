"""The conformance suite on the CUDA executor: on a simulated device, and on a real one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from cachetune.core.chunk_index import ChunkIndex
from cachetune.core.executor import execute
from cachetune.core.ops import COMPUTE, NOTHING, RESTORE, Op, Outcome, Schedule
from cachetune.core.plan import ReusePlan
from cachetune.runtime.cuda_executor import CudaExecutor
from cachetune.runtime.device import Device, open_device
from cachetune.runtime.handlers import Handlers
from cachetune.runtime.runner import Runner
from cachetune.runtime.session import Session
from cachetune.runtime.tiers import TierConfig
from executors.conformance import *  # noqa: F403
from executors.conformance import WORKLOAD, DecisionOf, Rig
from fake_cuda import FakeCuda
from support import make_op

from ..runtime import model_cases

OP_S = 0.001


class StubSession:
    """As much of a session as the executor sees."""

    failed = False

    def __init__(self, request_id: int, attempt: int) -> None:
        self.request_id = request_id
        self.attempt = attempt


class StubHandlers:
    """Ops that only last, on the device; loads last on the host and then on the device."""

    def __init__(self, device: Device, fail: dict[int, BaseException] | None = None) -> None:
        self.device = device
        self.fail = fail or {}
        self.done: list[int] = []

    def _last(self, _: Any, op: Op) -> Outcome:
        time.sleep(OP_S)
        if op.op_id in self.fail:
            raise self.fail[op.op_id]
        self.done.append(op.op_id)
        return NOTHING

    load = restore = select = prefill = head = decode = _last

    def read_by(self, _: Any, op: Op) -> list[Any]:
        return []

    def copy_in(self, _: Any, op: Op) -> None:
        time.sleep(OP_S)


def stub_executor(fail: dict[int, BaseException] | None = None) -> CudaExecutor:
    return CudaExecutor(
        cast(Handlers, StubHandlers(FakeCuda(), fail)),
        lambda r, attempt: cast(Session, StubSession(r, attempt)),
    )


def test_a_worker_that_cannot_begin_is_heard_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own thread for ends, say, which the system does not give."""
    usual = CudaExecutor._start

    def start(self: CudaExecutor, work: Any, args: tuple[Any, ...], name: str) -> None:
        if name.endswith(".ends"):
            raise RuntimeError("can't start new thread")
        usual(self, work, args, name)

    monkeypatch.setattr(CudaExecutor, "_start", start)
    with stub_executor() as executor:
        executor.submit([make_op(0)])
        with pytest.raises(RuntimeError, match="new thread"):
            executor.wait(executor.now_ns() + 20_000_000_000)


GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    ],
)


@pytest.fixture(params=["stub", "fake", "hbm", GPU])
def kind(request: pytest.FixtureRequest) -> str:
    """What carries out ops; `hbm`: as `fake`, the chunks in the device's own memory."""
    found: str = request.param
    return found


@pytest.fixture
def rig(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    made: list[CudaExecutor] = []
    requests = {r.request_id: r for r in WORKLOAD.requests}
    loaded, _ = model_cases.make_twins("llama")
    device = open_device("cuda") if kind == "cuda" else FakeCuda()
    folder = tmp_path_factory.mktemp("cuda")
    tiers = (*model_cases.TIERS, TierConfig("hbm", "device"))
    with Runner(loaded, folder, tiers, device=device, kv_capacity_tokens=2048) as runner:

        def index(plan: ReusePlan) -> ChunkIndex:
            runner.prepare(WORKLOAD, plan, "hbm" if kind == "hbm" else "dram")
            return runner.index(plan)

        def executor(plan: ReusePlan, decision_of: DecisionOf) -> CudaExecutor:
            if kind == "stub":
                made.append(stub_executor())
                return made[-1]

            def source(request_id: int, attempt: int) -> Session:
                wanted = requests[request_id]
                return runner._session(WORKLOAD, wanted, attempt, decision_of(request_id))

            made.append(CudaExecutor(runner._handlers(plan), source))
            return made[-1]

        yield Rig(runner.spec, index, executor)
        for one in made:
            one.close()
    assert not workers()


def workers() -> set[str]:
    """Threads of streams, launching, waiting or fake, that live."""
    names = (COMPUTE, RESTORE, "io.", "fake.")
    return {t.name for t in threading.enumerate() if t.name.startswith(names)}


@pytest.mark.parametrize("failing", range(4))
def test_an_error_in_any_op_reaches_the_caller(failing: int) -> None:
    ops = [
        make_op(0, "load", "io.dram.0"),
        make_op(1, "restore", "restore", deps=(0,)),
        make_op(2, "prefill", deps=(1,)),
        make_op(3, "head", deps=(2,)),
    ]
    error = RuntimeError(f"op {failing}")
    with (
        stub_executor({failing: error}) as executor,
        pytest.raises(RuntimeError, match=f"op {failing}"),
    ):
        execute(Schedule.of(ops), executor)
    assert not workers()


def test_the_next_read_goes_on_during_the_copy_before_it() -> None:
    """Two loads of one stream take less than the sum of their reads and copies; the best of a few
    runs, because others may have the cores."""
    took_ns = []
    for _ in range(4):
        with stub_executor() as executor:
            executor.warm(["io.dram.0"])
            ops = [make_op(i, "load", "io.dram.0") for i in range(20)]
            timeline = execute(Schedule.of(ops), executor)
        spans = sorted(timeline.spans, key=lambda s: s.seq)
        for before, after in zip(spans, spans[1:], strict=False):
            assert before.end_ns <= after.start_ns
        took_ns.append(timeline.makespan_ns)
    assert min(took_ns) < 20 * 2 * OP_S * 1e9 * 0.9


def test_close_drops_what_is_queued() -> None:
    executor = stub_executor()
    executor.submit([make_op(i) for i in range(2000)])
    time.sleep(0.01)
    began = time.perf_counter()
    executor.close()
    # What was launched has been carried out; on a device it cannot be withdrawn.
    assert time.perf_counter() - began < 10
    assert not workers()


def test_launching_does_not_wait_for_the_device() -> None:
    """Ops of two streams that depend on each other in turn are all launched at once."""
    with stub_executor() as executor:
        executor.warm([COMPUTE, RESTORE])
        ops = [
            make_op(i, stream=(COMPUTE, RESTORE)[i % 2], deps=(i - 1,) if i else ())
            for i in range(40)
        ]
        executor.submit(ops)
        tasks = [executor._tasks[op.op_id] for op in ops[1:]]
        for task in tasks:
            task.launched.wait()
        n_ended = sum(task.ended.is_set() for task in tasks)
        spans: list[Any] = []
        while found := executor.wait(None):
            spans += found
    assert n_ended < len(ops) // 2
    assert [s.op.op_id for s in spans] == list(range(40))
