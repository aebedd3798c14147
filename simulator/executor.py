"""`SimExecutor`: the simulated doer. SimPy in integer nanoseconds, byte-identical per seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import simpy

from ..core.errors import InvariantViolation
from ..core.hardware import HardwareProfile
from ..core.ops import NOTHING, Op, Outcome, Span
from ..core.rng import rng
from .cost import WAKE_AFTER_NS, CostModel
from .interference import Interference
from .resources import Link, Stream, Task, later

N_DRAWS = 256
"""Noise factors drawn at a time: one call per op would cost more than the op."""


class SimExecutor:
    """Implements `core.executor.Executor`.

    Args:
        profile: tiers and coefficients.
        seed: root of the noise streams.
        noise: standard deviation of the logarithm of a factor on every duration; its mean is
            one. Factors come from one random stream per op stream, in its order, so that a change
            on one stream moves no draw on another.
        outcomes: recorded outcomes by op id, replayed as they are (parity of adaptive policies,
            failed reads).

    Raises:
        ProfileError: the profile lacks `dispatch.gap`; other coefficients are missed when used.
    """

    def __init__(
        self,
        profile: HardwareProfile,
        *,
        seed: int = 0,
        noise: float = 0.0,
        outcomes: Mapping[int, Outcome] | None = None,
    ) -> None:
        self._cost = CostModel(profile)
        self._gap_ns = self._cost.dispatch_gap_ns
        self._interference = Interference(profile)
        self._is_interfered = self._interference.is_modelled
        self._running: list[Task] = []
        self._seed = seed
        self._noise = noise
        self._outcomes = outcomes or {}
        self._env = simpy.Environment()
        self._streams: dict[tuple[int, str], Stream] = {}
        self._links: dict[str, Link] = {}
        self._open: dict[int, Task] = {}
        self._ended: set[int] = set()
        self._finished: list[Span] = []
        self._factors: dict[str, _Factors] = {}
        self._n_submitted = 0

    def now_ns(self) -> int:
        """The simulated clock."""
        return int(self._env.now)

    def submit(self, ops: Sequence[Op]) -> None:
        """Queue ops on their streams, in this order.

        Raises:
            InvariantViolation: an op id comes twice, or a dependency was never submitted.
        """
        now = int(self._env.now)
        touched: dict[Stream, None] = {}
        for op in ops:
            if op.op_id in self._open or op.op_id in self._ended:
                raise InvariantViolation(f"op ids are unique, but {op.op_id} comes twice")
            stream = self._stream(op)
            task = Task(op, self._n_submitted, now, stream)
            self._n_submitted += 1
            for dep in op.deps:
                before = self._open.get(dep)
                if before is not None:
                    before.dependents.append(task)
                    task.n_unmet += 1
                elif dep not in self._ended:
                    raise InvariantViolation(
                        f"INV-3 op {op.op_id} waits for {dep}, which was never submitted"
                    )
            self._open[op.op_id] = task
            stream.queue.append(task)
            touched[stream] = None
        for stream in touched:
            self._start_next(stream)

    def wait(self, until_ns: int | None) -> list[Span]:
        """Spans that end at the earliest moment any does, all of that nanosecond.

        An op that ends exactly at `until_ns` is returned; only then is the clock's arrival there
        an empty list.
        """
        env = self._env
        while self._open:
            at = env.peek()
            if self._finished:
                if at > env.now:
                    break
            elif until_ns is not None and at > until_ns:
                break
            env.step()
        if self._finished:
            finished, self._finished = self._finished, []
            return finished
        if until_ns is not None and until_ns > env.now:
            env.run(until=until_ns)
        return []

    def _stream(self, op: Op) -> Stream:
        key = (op.device, op.stream)
        stream = self._streams.get(key)
        if stream is None:
            stream = self._streams[key] = Stream(f"{op.device}:{op.stream}")
        return stream

    def _link(self, tier: str) -> Link:
        link = self._links.get(tier)
        if link is None:
            link = Link(self._env, self._cost.profile.tier(tier), self._end)
            self._links[tier] = link
        return link

    def _start_next(self, stream: Stream) -> None:
        """Start the head of the queue if the stream is free and its dependencies have ended."""
        if stream.is_busy or not stream.queue or stream.queue[0].n_unmet:
            return
        task = stream.queue.popleft()
        stream.is_busy = True
        task.start_ns = int(self._env.now) + self._gap_ns
        factor = self._factor(stream) if self._noise else 1.0
        if self._is_interfered:
            self._interference.begin(task.op)
        if task.op.kind == "load":
            parts = self._cost.load_ns(task.op)
            own_ns, task.n_bytes = parts.fixed_ns, round(parts.n_bytes * factor)
        else:
            own_ns = self._cost.duration_ns(task.op)
        if self._env.now - stream.idle_since_ns >= WAKE_AFTER_NS:
            own_ns += self._cost.wake_ns(task.op)
        delay = self._gap_ns + round(own_ns * factor)
        if not self._is_interfered:
            later(self._env, delay, self._on_timeout, task)
            return
        task.left_ns, task.since_ns = delay, int(self._env.now)
        self._running.append(task)
        self._retime()

    def _retime(self) -> None:
        """Something began or ended: what runs beside it goes at another rate from now on."""
        now = int(self._env.now)
        for task in self._running:
            rate = self._interference.rate(task.op)
            if rate == task.rate:
                continue
            task.left_ns -= (now - task.since_ns) * task.rate
            task.since_ns, task.rate = now, rate
            task.version += 1
            delay = max(0, math.ceil(task.left_ns / rate))
            later(self._env, delay, self._on_version, (task, task.version))

    def _on_version(self, event: simpy.Event) -> None:
        due: tuple[Task, int] = event.value  # type: ignore[assignment]
        task, version = due
        if version == task.version:
            self._running.remove(task)
            self._worked(task)

    def _on_timeout(self, event: simpy.Event) -> None:
        task: Task = event.value  # type: ignore[assignment]
        self._worked(task)

    def _worked(self, task: Task) -> None:
        """An op's own work is done; what is left of a load are its bytes."""
        if task.n_bytes:
            if self._is_interfered:
                self._interference.moves(task.op)
                self._retime()
            self._link(task.op.tier).join(task, task.n_bytes)
        else:
            self._end(task)

    def _end(self, task: Task) -> None:
        """Record the span, free the stream, and start whatever waited for either."""
        op = task.op
        self._finished.append(
            Span(
                op,
                task.seq,
                task.submit_ns,
                task.start_ns,
                int(self._env.now),
                self._outcomes.get(op.op_id, NOTHING),
            )
        )
        if self._is_interfered:
            self._interference.end(op)
            self._retime()
        del self._open[op.op_id]
        self._ended.add(op.op_id)
        task.stream.is_busy = False
        task.stream.idle_since_ns = int(self._env.now)
        self._start_next(task.stream)
        for waiting in task.dependents:
            waiting.n_unmet -= 1
            if not waiting.n_unmet and waiting.stream.queue[0] is waiting:
                self._start_next(waiting.stream)

    def _factor(self, stream: Stream) -> float:
        factors = self._factors.get(stream.name)
        if factors is None:
            factors = self._factors[stream.name] = _Factors(self._seed, stream.name, self._noise)
        return factors.next()


class _Factors:
    """Log-normal factors with mean one, from one named random stream."""

    __slots__ = ("_draws", "_rng", "_sigma")

    def __init__(self, seed: int, name: str, sigma: float) -> None:
        self._rng = rng(seed, "noise", name)
        self._sigma = sigma
        self._draws: list[float] = []

    def next(self) -> float:
        if not self._draws:
            z = self._rng.standard_normal(N_DRAWS)
            self._draws = np.exp(self._sigma * z - self._sigma**2 / 2)[::-1].tolist()
        return self._draws.pop()
