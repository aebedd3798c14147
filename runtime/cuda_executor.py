"""`CudaExecutor`: the three methods on devices with streams of their own.

Each stream of the plan has a thread that launches its ops in order, and one that waits for their
ends; a compute or restore op is launched once those it depends on are, and follows their events on
the device. An I/O stream's thread waits for the ends of its dependencies, reads into pinned pages,
and queues the copy on its device's copy-in stream, where what lies on the device already has no
place; the next read goes on meanwhile. Times are those of the devices' events, on the host's clock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch

from ..core.ops import COMPUTE, NOTHING, Op, Outcome, Span
from ..core.timeline import HostWait
from .device import COPY_IN, Stream
from .event_clock import EventClock
from .executor import Item, Lane, WorkerExecutor
from .handlers import Made
from .session import Session

IN_FLIGHT = 2
"""Loads of an I/O stream whose copies have not ended: one is read while the other is copied."""


@dataclass(slots=True, eq=False)
class _Task:
    """An op on its way."""

    op: Op
    deps: list[_Task]
    sessions: Sequence[Session] = ()
    seq: int = 0
    submit_ns: int = 0
    begin_ns: int = 0
    """When a thread of the host began with it; of loads."""
    start: Any = None
    end: Any = None
    end_ns: int = 0
    made: list[Made] = field(default_factory=list)
    keep: list[object] = field(default_factory=list)
    """What must not change before the op has ended."""
    launched: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)


class CudaExecutor(WorkerExecutor):
    """The real executor on one GPU, or on several as pipeline stages."""

    def _prepare(self) -> None:
        self._devices = [h.device for h in self._handlers]
        for device in self._devices:
            device.synchronise("executor")  # its streams do not wait for what torch's default did
        self.clocks = [EventClock(device) for device in self._devices]
        self._streams: dict[Lane, Stream] = {}
        self._reaped: dict[Lane, SimpleQueue[_Task | None]] = {}
        self._tasks: dict[int, _Task] = {}
        """Ops that have not ended."""
        self._places: dict[Lane, threading.Semaphore] = {}
        self._making = threading.Lock()
        for stage, device in enumerate(self._devices):
            device.on_wait = partial(self._note, stage)

    def _note(self, stage: int, wait: HostWait) -> None:
        self._waits.append(replace(wait, device=stage))

    def _forget(self) -> None:
        """See `WorkerExecutor`; what was launched ends first, as it may use the sessions' KV."""
        for stream in self._streams.values():
            with suppress(Exception):  # the caller of `wait` has the first error
                stream.mark().wait()
            stream.close()
        self._streams.clear()
        for device in self._devices:
            device.on_wait = None
        super()._forget()

    def _start(self, work: Callable[..., None], args: tuple[Any, ...], name: str) -> None:
        """See `WorkerExecutor`; what computes is launched by the thread of the run before."""
        stage, stream = args[0]
        device = self._devices[stage]
        if stream != COMPUTE or work != self._work or device.standing is None:
            super()._start(work, args, name)
            return
        self._threads.append(
            device.standing.start(f"{stream} of {device.name}", lambda: work(*args))
        )

    def _register(self, op: Op) -> None:
        deps = [task for d in op.deps if (task := self._tasks.get(d)) is not None]
        self._tasks[op.op_id] = _Task(op, deps)

    def _stop(self) -> None:
        super()._stop()
        for task in list(self._tasks.values()):
            task.launched.set()
            task.ended.set()
        for places in list(self._places.values()):
            places.release(IN_FLIGHT)
        for reaped in list(self._reaped.values()):
            reaped.put(None)

    def _stream(self, lane: Lane) -> Stream:
        with self._making:
            if lane not in self._streams:
                self._streams[lane] = self._devices[lane[0]].stream(lane[1])
            return self._streams[lane]

    @torch.inference_mode()
    def _work(self, lane: Lane, queue: SimpleQueue[Item | None]) -> None:
        reaped: SimpleQueue[_Task | None] = SimpleQueue()
        self._reaped[lane] = reaped
        try:  # around all of it: whoever waits would never hear of a worker that is gone
            self._start(self._reap, (lane, reaped), f"{lane[1]}@{lane[0]}.ends")
            places = self._places[lane] = threading.Semaphore(IN_FLIGHT)
            while (item := queue.get()) is not None:
                op, seq, submit_ns = item
                task = self._tasks[op.op_id]
                task.seq, task.submit_ns = seq, submit_ns
                if op.kind == "load":
                    places.acquire()
                    self._load(task, lane)
                else:
                    self._launch(task, lane)
                if self._stopping:
                    break
                reaped.put(task)
                task.launched.set()
        except BaseException as e:
            self._fail(e)
        reaped.put(None)

    def _launch(self, task: _Task, lane: Lane) -> None:
        """Queue an op behind those it depends on; nothing waits for the device."""
        stream = self._stream(lane)
        for dep in task.deps:
            dep.launched.wait()
            if self._stopping:
                return
            if (dep.op.device, dep.op.stream) != lane and not dep.ended.is_set():
                stream.follow(dep.end)
        task.sessions = self._sessions_of(task.op)
        task.start = stream.mark()
        stream.run(lambda: self._make(task))
        task.end = stream.mark()

    def _load(self, task: _Task, lane: Lane) -> None:
        """Read on the host once the dependencies have ended, then queue the copy, if any."""
        for dep in task.deps:
            dep.ended.wait()
        if self._stopping:
            return
        task.begin_ns = self.now_ns()
        task.sessions = self._sessions_of(task.op)
        task.made.append(self._call(task.sessions, task.op))
        handlers, stream = self._handlers[lane[0]], self._stream((lane[0], COPY_IN))
        if not task.sessions[0].failed:
            # What was read is kept until the copy has ended.
            reads = handlers.read_by(task.sessions[0], task.op)
            task.keep += reads
            if reads and all(rows.is_on(handlers.device) for rows in reads):
                stream = self._stream(lane)
            else:
                stream.run(lambda: self._copy(task))
        task.end = stream.mark()

    @torch.inference_mode()
    def _make(self, task: _Task) -> None:
        task.made.append(self._call(task.sessions, task.op))

    @torch.inference_mode()
    def _copy(self, task: _Task) -> None:
        self._handlers[task.op.device].copy_in(task.sessions[0], task.op)

    @torch.inference_mode()
    def _reap(self, lane: Lane, queue: SimpleQueue[_Task | None]) -> None:
        """Wait for one end after another; make spans of them."""
        free_ns = 0
        while (task := queue.get()) is not None:
            try:
                with self._devices[lane[0]].waiting(f"end of {task.op.kind}", lane[1]):
                    task.end.wait()
                outcome = self._outcome(task)
                span = self._span(task, lane[0], free_ns, outcome)
            except BaseException as e:
                self._fail(e)
                return
            if self._stopping:
                return
            free_ns = task.end_ns = span.end_ns
            task.keep.clear()
            task.deps, task.sessions = [], ()
            self._places[lane].release()
            # Told first: what follows may be told by other threads before this one goes on.
            self._done(span)
            del self._tasks[task.op.op_id]
            task.ended.set()

    def _outcome(self, task: _Task) -> Outcome:
        made = task.made[0] if task.made else NOTHING
        outcome = made() if callable(made) else made
        if outcome is not NOTHING:
            self._settle(task.sessions, outcome)
        return outcome

    def _span(self, task: _Task, device: int, free_ns: int, outcome: Outcome) -> Span:
        """Times on the host's clock.

        An op cannot start before its stream is free or its dependencies have ended; where two
        readings of the clocks disagree by their errors, the later one holds. A load that was read
        during the copy before it starts when that copy ends.
        """
        clock = self.clocks[device]
        start_ns = task.begin_ns or clock.ns(task.start)
        for dep in task.deps:
            dep.ended.wait()
            start_ns = max(start_ns, dep.end_ns)
        start_ns = max(start_ns, free_ns, task.submit_ns)
        end_ns = max(start_ns, clock.ns(task.end))
        return Span(task.op, task.seq, task.submit_ns, start_ns, end_ns, outcome)
