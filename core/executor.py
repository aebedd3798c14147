"""The `Executor` protocol, and the two ways to drive one: `execute` and `serve`.

`execute` replays one fixed DAG (calibration, parity: spans are joined by op id). `serve` is the
closed loop, in which timing changes batching, so only distributions may be compared. Never mix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from .ops import Op, Schedule, Span
from .timeline import Timeline

if TYPE_CHECKING:
    from .engine import Engine
    from .workload import Workload


class Executor(Protocol):
    """Carries out ops on in-order streams. Simulated, CPU and CUDA implement these three.

    An op takes its place in its stream at submission and then waits for its dependencies, as
    CUDA streams do; a later op of the stream never overtakes it.
    """

    def now_ns(self) -> int:
        """The executor's clock."""
        ...

    def submit(self, ops: Sequence[Op]) -> None:
        """Queue ops; each dependency was submitted before or is earlier in `ops`."""
        ...

    def wait(self, until_ns: int | None) -> list[Span]:
        """Spans that finished, in end order, at the earliest moment there are any.

        Returns an empty list once the clock reaches `until_ns`. With None and nothing under way
        it returns at once.
        """
        ...


def execute(schedule: Schedule, executor: Executor) -> Timeline:
    """Submit the whole DAG at once and wait for every span."""
    start_ns = executor.now_ns()
    executor.submit(schedule.ops)
    spans: list[Span] = []
    while len(spans) < len(schedule.ops):
        done = executor.wait(None)
        if not done:
            raise RuntimeError(
                f"executor went idle with {len(schedule.ops) - len(spans)} ops left of "
                f"{len(schedule.ops)}"
            )
        spans.extend(done)
    return Timeline(spans=tuple(spans), start_ns=start_ns, requests=(), label=schedule.label)


def serve(workload: Workload, engine: Engine, executor: Executor) -> Timeline:
    """Feed arrivals and finished spans to the engine until every request has ended."""
    start_ns = executor.now_ns()
    pending = sorted(workload.requests, key=lambda r: (r.arrival_ns, r.request_id), reverse=True)
    spans: list[Span] = []
    while pending or engine.n_open:
        now = executor.now_ns()
        while pending and start_ns + pending[-1].arrival_ns <= now:
            executor.submit(engine.on_arrival(pending.pop(), now))
        until = start_ns + pending[-1].arrival_ns if pending else None
        done = executor.wait(until)
        for span in done:
            spans.append(span)
            executor.submit(engine.on_done(span))
        if not done and until is None and engine.n_open:
            raise RuntimeError(f"executor went idle with {engine.n_open} requests open")
    return Timeline(
        spans=tuple(spans), start_ns=start_ns, requests=workload.requests, label=workload.name
    )
