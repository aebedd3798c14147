"""What ops compete for: in-order streams, and links that loads share evenly.

Both are driven by callbacks on bare events: a generator per op would cost several times more.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable

import simpy

from ..core.hardware import Tier
from ..core.ops import Op
from ..core.units import NS_PER_S, ceil_div

EVEN_SHARES = math.lcm(*range(1, 17))
"""A link's rate divides evenly among up to 16 loads (`ReusePlan.n_io_workers`)."""


def later(
    env: simpy.Environment,
    delay_ns: int,
    callback: Callable[[simpy.Event], None],
    value: object = None,
) -> None:
    """Call `callback` in `delay_ns`; the event carries `value`."""
    env.timeout(delay_ns, value).callbacks = [callback]


class Task:
    """One submitted op on its way through a stream."""

    __slots__ = (
        "dependents", "left_ns", "n_bytes", "n_unmet", "op", "rate", "seq", "since_ns", "start_ns",
        "stream", "submit_ns", "version",
    )  # fmt: skip

    def __init__(self, op: Op, seq: int, submit_ns: int, stream: Stream) -> None:
        self.op = op
        self.seq = seq
        self.submit_ns = submit_ns
        self.start_ns = -1
        self.stream = stream
        self.n_unmet = 0
        """Dependencies that have not ended."""
        self.dependents: list[Task] = []
        self.n_bytes = 0
        """What a load moves once its own work is done."""
        self.left_ns = 0.0
        """Work left at full speed, as of `since_ns`; `rate` is the share of it since then."""
        self.since_ns = 0
        self.rate = 0.0
        self.version = 0
        """Counts changes of rate: an end that was set for an older one is void."""


class Stream:
    """One worker. The task at the head of the queue holds its place while it waits.

    Waiting first and queueing afterwards would let a later op overtake, which no CUDA stream does.
    """

    __slots__ = ("idle_since_ns", "is_busy", "name", "queue")

    def __init__(self, name: str) -> None:
        self.name = name
        self.queue: deque[Task] = deque()
        self.is_busy = False
        self.idle_since_ns = -(1 << 62)
        """A stream that never worked has always been idle."""


class Link:
    """A tier's bandwidth under processor sharing, exact in integers.

    Each of n active loads moves at min(worker rate, link rate / n). As all move alike, one
    running total of the work done per load orders every completion: a load that joins at total T
    with work w ends when the total reaches T + w. Work is counted in bytes times
    `EVEN_SHARES` times the rates' common denominator times ns per s, so that no product rounds;
    a load ends at the first whole nanosecond by which its bytes are there.
    """

    __slots__ = (
        "_active",
        "_armed_ns",
        "_env",
        "_link_rate",
        "_on_end",
        "_since_ns",
        "_total",
        "_work_per_byte",
        "_worker_rate",
    )

    def __init__(self, env: simpy.Environment, tier: Tier, on_end: Callable[[Task], None]) -> None:
        worker, worker_parts = tier.worker_bytes_per_s.as_integer_ratio()
        link, link_parts = tier.link_bytes_per_s.as_integer_ratio()
        parts = math.lcm(worker_parts, link_parts)
        self._worker_rate = worker * (parts // worker_parts) * EVEN_SHARES
        self._link_rate = link * (parts // link_parts) * EVEN_SHARES
        self._work_per_byte = parts * EVEN_SHARES * NS_PER_S
        self._env = env
        self._on_end = on_end
        self._active: list[tuple[int, int, Task]] = []
        self._total = 0
        self._since_ns = 0
        self._armed_ns = -1

    def join(self, task: Task, n_bytes: int) -> None:
        """Start moving the bytes of `task`; `on_end` is called with it when they are there."""
        self._advance()
        heapq.heappush(self._active, (self._total + n_bytes * self._work_per_byte, task.seq, task))
        self._arm()

    def _rate(self) -> int:
        return min(self._worker_rate, self._link_rate // len(self._active))

    def _advance(self) -> None:
        """Bring the running total up to the clock."""
        now = int(self._env.now)
        if self._active:
            self._total += (now - self._since_ns) * self._rate()
        self._since_ns = now

    def _arm(self) -> None:
        """Keep one pending event, at the next completion; an outdated one fires in vain."""
        if not self._active:
            self._armed_ns = -1
            return
        delay = ceil_div(max(0, self._active[0][0] - self._total), self._rate())
        at = self._since_ns + delay
        if at != self._armed_ns:
            self._armed_ns = at
            later(self._env, delay, self._fire)

    def _fire(self, event: simpy.Event) -> None:
        if self._env.now != self._armed_ns:
            return
        self._advance()
        ended = []
        while self._active and self._active[0][0] <= self._total:
            ended.append(heapq.heappop(self._active)[2])
        self._armed_ns = -1
        self._arm()
        for task in ended:
            self._on_end(task)
