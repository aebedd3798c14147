"""`CpuExecutor`: carries out ops for real, a worker thread per stream, on the monotonic clock.

An op takes its place in its stream's queue at submission; the worker then waits for its
dependencies, so order within a stream is kept as CUDA keeps it.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from queue import SimpleQueue
from typing import Literal

import torch

from ..core.ops import NOTHING, Op, Outcome, Span
from .handlers import Handlers
from .session import Session

SessionSource = Callable[[int, int], Session]
"""Opens the session of (request id, attempt)."""

_Item = tuple[Op, int, int]


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


class CpuExecutor:
    """The real executor on a CPU. Close it, or use it as a context manager."""

    def __init__(
        self,
        handlers: Handlers,
        source: SessionSource,
        on_end: Callable[[Session], None] | None = None,
    ) -> None:
        _switch_interval.shorten()
        self._handlers = handlers
        self._source = source
        self._on_end = on_end
        self._sessions: dict[int, Session] = {}
        self._queues: dict[str, SimpleQueue[_Item | None]] = {}
        self._threads: list[threading.Thread] = []
        self._ended: dict[int, threading.Event] = {}
        self._finished: deque[Span] = deque()
        self._changed = threading.Condition()
        self._in_flight = 0
        self._seq = 0
        self._error: BaseException | None = None
        self._stopping = False
        self._closed = False

    def __enter__(self) -> CpuExecutor:
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
            self._ended[op.op_id] = threading.Event()
            with self._changed:
                self._in_flight += 1
            self._queue(op.stream).put((op, self._seq, self.now_ns()))
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
        """Start the workers of `streams` before anything is timed."""
        for stream in sorted(streams):
            self._queue(stream)

    def open_sessions(self) -> list[Session]:
        """Sessions that have not ended, as after the fixed DAG of a prompt."""
        return list(self._sessions.values())

    def close(self) -> None:
        """Stop the workers once the op each is at has ended; queued ops are dropped."""
        self._stop()
        for thread in self._threads:
            thread.join()
        if not self._closed:
            self._closed = True
            _switch_interval.give_back()
        self._queues.clear()
        self._threads.clear()

    def _stop(self) -> None:
        """Wake every worker, also those that wait for an op that will never end."""
        self._stopping = True
        for event in list(self._ended.values()):
            event.set()
        for queue in list(self._queues.values()):
            queue.put(None)

    def _open(self, op: Op) -> None:
        request_id = op.request_ids[0]
        session = self._sessions.get(request_id)
        if session is None or session.attempt != op.attempt:
            self._sessions[request_id] = self._source(request_id, op.attempt)

    def _queue(self, stream: str) -> SimpleQueue[_Item | None]:
        if stream not in self._queues:
            queue: SimpleQueue[_Item | None] = SimpleQueue()
            thread = threading.Thread(target=self._work, args=(queue,), name=stream, daemon=True)
            self._queues[stream] = queue
            self._threads.append(thread)
            thread.start()
        return self._queues[stream]

    @torch.inference_mode()
    def _work(self, queue: SimpleQueue[_Item | None]) -> None:
        while (item := queue.get()) is not None:
            op, seq, submit_ns = item
            self._await(op.deps)
            if self._stopping:
                return
            try:
                start_ns = self.now_ns()
                outcome = self._run(op)
                end_ns = self.now_ns()
            except BaseException as e:
                with self._changed:
                    self._error = self._error or e
                    self._changed.notify_all()
                self._stop()
                return
            self._ended.pop(op.op_id).set()
            with self._changed:
                self._in_flight -= 1
                self._finished.append(Span(op, seq, submit_ns, start_ns, end_ns, outcome))
                self._changed.notify_all()

    def _await(self, deps: Sequence[int]) -> None:
        for dep in deps:
            event = self._ended.get(dep)
            if event is not None and not self._stopping:  # an op that has ended is not listed
                event.wait()

    def _run(self, op: Op) -> Outcome:
        sessions = [self._sessions[r] for r in op.request_ids]
        if op.kind == "decode":
            outcome = self._handlers.decode(sessions, op)
        elif sessions[0].failed:
            # Ops cannot be withdrawn: those of a failed attempt pass without doing anything.
            return NOTHING
        else:
            kind: Literal["load", "restore", "select", "prefill", "head"] = op.kind
            outcome = getattr(self._handlers, kind)(sessions[0], op)
        for session in sessions:
            if session.request_id in outcome.ended:
                del self._sessions[session.request_id]
                if self._on_end is not None:
                    self._on_end(session)
        return outcome
