"""`CpuExecutor`: carries out ops for real, a worker thread per stream, on the monotonic clock.

An op takes its place in its stream's queue at submission; the worker then waits for its
dependencies, so order within a stream is kept as CUDA keeps it. Every device (pipeline stage) has
streams of its own.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import Literal, Self

import torch

from ..core.ops import NOTHING, Op, Outcome, Span
from ..core.timeline import HostWait
from .cores import bind
from .handlers import Handlers, Made
from .session import Session
from .standing_threads import Standing

log = logging.getLogger(__name__)

SessionSource = Callable[[int, int], Session]
"""Opens the session of (request id, attempt)."""

START_S = 5.0
"""Longest time in which a thread that was asked for shows itself."""

Item = tuple[Op, int, int]
"""An op, its place in submission order, and when it was submitted."""

Lane = tuple[int, str]
"""One stream of one device."""


class _SwitchInterval:
    """Python's thread switch interval, short while any executor is open.

    Workers hand over at op borders; the default of 5 ms would let an I/O worker's few lines of
    Python hold up the compute stream for longer than many ops take.
    """

    SHORT_S = 0.0002

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_open = 0
        self._usual_s = 0.0

    def shorten(self) -> None:
        with self._lock:
            if not self._n_open:
                self._usual_s = sys.getswitchinterval()
                sys.setswitchinterval(self.SHORT_S)
            self._n_open += 1

    def give_back(self) -> None:
        with self._lock:
            self._n_open -= 1
            if not self._n_open:
                sys.setswitchinterval(self._usual_s)


_switch_interval = _SwitchInterval()


class WorkerExecutor(ABC):
    """What executors with a worker thread per stream share. Close it, or use it as a context.

    Args:
        handlers: what carries out ops, one for each device.
        source: opens a session at the first op of an attempt.
        on_end: called with each session whose request has ended.
        let_go: called once with each session that was opened: behind `on_end`, when another attempt
            takes its place, or when the executor is closed, however its run ended.
    """

    def __init__(
        self,
        handlers: Handlers | Sequence[Handlers],
        source: SessionSource,
        on_end: Callable[[Session], None] | None = None,
        let_go: Callable[[Session], None] | None = None,
    ) -> None:
        _switch_interval.shorten()
        self._handlers = list(handlers) if isinstance(handlers, Sequence) else [handlers]
        self._source = source
        self._on_end = on_end
        self._let_go = let_go
        self._sessions: dict[int, Session] = {}
        self._queues: dict[Lane, SimpleQueue[Item | None]] = {}
        self._threads: list[threading.Thread | Standing] = []
        self._finished: deque[Span] = deque()
        self._waits: list[HostWait] = []
        self._changed = threading.Condition()
        self._in_flight = 0
        self._seq = 0
        self._error: BaseException | None = None
        self._stopping = False
        self._closed = False
        self._prepare()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def now_ns(self) -> int:
        """Monotonic nanoseconds."""
        return time.perf_counter_ns()

    def submit(self, ops: Sequence[Op]) -> None:
        """Queue ops on their streams; opens the session of a request seen for the first time."""
        for op in ops:
            if op.kind != "decode":
                self._open(op)
            self._register(op)
            with self._changed:
                self._in_flight += 1
            self._queue((op.device, op.stream)).put((op, self._seq, self.now_ns()))
            self._seq += 1

    def wait(self, until_ns: int | None) -> list[Span]:
        """Spans that ended since the last call; blocks until there are some, or `until_ns`."""
        with self._changed:
            while not self._finished and self._error is None:
                if until_ns is None:
                    if not self._in_flight:
                        return []
                    self._changed.wait()
                    continue
                left_ns = until_ns - self.now_ns()
                if left_ns <= 0:
                    return []
                self._changed.wait(left_ns / 1e9)
            if self._error is not None:
                raise self._error
            spans = sorted(self._finished, key=lambda s: (s.end_ns, s.seq))
            self._finished.clear()
        return spans

    def warm(self, streams: Iterable[str]) -> None:
        """Start the workers of `streams` on every device before anything is timed."""
        for stream in sorted(streams):
            for device in range(len(self._handlers)):
                self._queue((device, stream))

    def host_waits(self) -> tuple[HostWait, ...]:
        """Where the host has waited for a device since this executor was made."""
        return tuple(self._waits)

    def open_sessions(self) -> list[Session]:
        """Sessions that have not ended, as after the fixed DAG of a prompt; none once closed."""
        return list(self._sessions.values())

    def close(self) -> None:
        """Stop the workers once the op each is at has ended; queued ops are dropped.

        An interrupt that comes meanwhile is passed on when they have ended.
        """
        try:
            self._join()
        except KeyboardInterrupt:
            self._join()
            raise
        finally:
            self._forget()

    def _join(self) -> None:
        self._stop()
        for thread in self._threads:
            give_up = time.monotonic() + START_S
            while time.monotonic() < give_up:
                with suppress(RuntimeError):  # it was interrupted while it was started
                    thread.join()
                    break
                time.sleep(0.001)

    def _forget(self) -> None:
        if not self._closed:
            self._closed = True
            _switch_interval.give_back()
        self._queues.clear()
        self._threads.clear()
        for request_id in list(self._sessions):
            self._drop(request_id)

    @abstractmethod
    def _prepare(self) -> None:
        """What an executor has besides; the handlers are there."""

    @abstractmethod
    def _register(self, op: Op) -> None:
        """An op is about to be queued."""

    @abstractmethod
    def _work(self, lane: Lane, queue: SimpleQueue[Item | None]) -> None:
        """Carry out the ops of one stream, one after another, until None comes."""

    def _stop(self) -> None:
        """Wake every worker, also those that wait for an op that will never end."""
        self._stopping = True
        for queue in list(self._queues.values()):
            queue.put(None)

    def _open(self, op: Op) -> None:
        for member in op.members:
            request_id = member.request_ids[0]
            session = self._sessions.get(request_id)
            if session is None or session.attempt != member.attempt:
                if session is not None:  # its ops have ended: the engine waits for that
                    self._drop(request_id)
                self._sessions[request_id] = self._source(request_id, member.attempt)

    def _drop(self, request_id: int) -> None:
        session = self._sessions.pop(request_id)
        if self._let_go is not None:
            self._let_go(session)

    def _queue(self, lane: Lane) -> SimpleQueue[Item | None]:
        if lane not in self._queues:
            queue: SimpleQueue[Item | None] = SimpleQueue()
            device, stream = lane
            name = f"{stream}@{device}" if device else stream
            self._queues[lane] = queue
            self._start(self._work, (lane, queue), name)
        return self._queues[lane]

    def _start(self, work: Callable[..., None], args: tuple[object, ...], name: str) -> None:
        thread = threading.Thread(target=work, args=args, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _fail(self, error: BaseException) -> None:
        """The caller of `wait` gets the first error; nothing goes on."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()
        self._stop()

    def _done(self, span: Span) -> None:
        with self._changed:
            self._in_flight -= 1
            self._finished.append(span)
            self._changed.notify_all()

    def _sessions_of(self, op: Op) -> list[Session]:
        return [self._sessions[r] for r in op.request_ids]

    def _call(self, sessions: Sequence[Session], op: Op) -> Made:
        handlers = self._handlers[op.device]
        if op.kind == "decode":
            return handlers.decode(sessions, op)
        if op.parts:
            return handlers.prefill_all(sessions, op)
        if sessions[0].failed:
            # Ops cannot be withdrawn: those of a failed attempt pass without doing anything.
            return NOTHING
        kind: Literal["load", "restore", "select", "prefill", "head"] = op.kind
        made: Made = getattr(handlers, kind)(sessions[0], op)
        return made

    def _settle(self, sessions: Sequence[Session], outcome: Outcome) -> None:
        """Let go of the sessions that have ended."""
        for session in sessions:
            if session.request_id in outcome.ended:
                if self._on_end is not None:
                    self._on_end(session)
                self._drop(session.request_id)


class CpuExecutor(WorkerExecutor):
    """The real executor on a CPU."""

    def _prepare(self) -> None:
        self._ended: dict[int, threading.Event] = {}

    def _register(self, op: Op) -> None:
        self._ended[op.op_id] = threading.Event()

    def _stop(self) -> None:
        super()._stop()
        for event in list(self._ended.values()):
            event.set()

    @torch.inference_mode()
    def _work(self, lane: Lane, queue: SimpleQueue[Item | None]) -> None:
        device, stream = lane
        try:  # around all of it: whoever waits would never hear of a worker that is gone
            try:
                bind(stream, device, torch.get_num_threads())
            except OSError as e:  # the cores that may be used have changed, or none may be chosen
                log.warning("%s runs on whatever core is free: %s", stream, e)
            while (item := queue.get()) is not None:
                op, seq, submit_ns = item
                self._await(op.deps)
                if self._stopping:
                    return
                start_ns = self.now_ns()
                outcome = self._run(op)
                end_ns = self.now_ns()
                # Told first: what follows may end before this thread goes on.
                self._done(Span(op, seq, submit_ns, start_ns, end_ns, outcome))
                self._ended.pop(op.op_id).set()
        except BaseException as e:
            self._fail(e)

    def _await(self, deps: Sequence[int]) -> None:
        for dep in deps:
            event = self._ended.get(dep)
            if event is not None and not self._stopping:  # an op that has ended is not listed
                event.wait()

    def _run(self, op: Op) -> Outcome:
        sessions = self._sessions_of(op)
        made = self._call(sessions, op)
        outcome = made() if callable(made) else made
        self._settle(sessions, outcome)
        return outcome
