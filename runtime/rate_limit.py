"""A limiter that makes a fast medium act as a slower link, so that such a tier can be tested.

The link is a queue in virtual time: each request takes the next free slot, of latency plus bytes
over rate, and its worker sleeps to the slot's end. Slots never overlap, so the sum over all
workers cannot exceed the rate in the long run. Time that a worker loses by waking late is not the
link's: if it asks again at once, its next slot starts where the last one ended.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time

SPIN_S = 40e-6
"""The end of a wait is spun: a sleep is late by about 25 us. A spinning worker takes a core from
others, which no slow medium does, so this is kept short."""

TIMER_SLACK_NS = 1000
"""How late Linux may wake a limited worker on purpose; 50 us unless told."""

PACE_S = 500e-6
"""Between the requests of one read, waits shorter than this are left to the next one."""

QUEUE_GAP_S = 500e-6
"""A pause shorter than this does not idle the link: it is our Python between two requests."""

LATE_S = 20e-3
"""The most that is given back to a worker that woke late."""


class RateLimiter:
    """One link, shared by the workers of a tier. First come, first served.

    Args:
        bytes_per_s: rate of the link, above 0.
        latency_s: added to every request.
    """

    def __init__(self, bytes_per_s: float, latency_s: float = 0.0) -> None:
        self._s_per_byte = 1.0 / bytes_per_s
        self._latency_s = latency_s
        self._free_s = float("-inf")
        self._lock = threading.Lock()
        self._worker = threading.local()

    def reserve(self, n_bytes: int, asked_s: float | None = None) -> float:
        """Take the next slot for `n_bytes`; returns its end on `time.perf_counter`.

        `asked_s`: when the request was due, if that is earlier than now. A worker in the middle
        of a read passes the end of its last slot.
        """
        if asked_s is None:
            asked_s = time.perf_counter()
            end_s, woke_s = getattr(self._worker, "last", (asked_s, 0.0))
            if asked_s - woke_s < QUEUE_GAP_S:
                asked_s = max(end_s, asked_s - LATE_S)
        with self._lock:
            start_s = self._free_s
            if asked_s - start_s > QUEUE_GAP_S:
                start_s = asked_s
            self._free_s = start_s + self._latency_s + n_bytes * self._s_per_byte
            return self._free_s

    def pace(self, end_s: float) -> None:
        """Wait for about `end_s`, so that workers take turns; the read's last slot is exact."""
        left_s = end_s - time.perf_counter()
        if left_s > PACE_S:
            time.sleep(left_s - SPIN_S)

    def wait(self, end_s: float) -> None:
        """Sleep until `end_s`, off the interpreter lock."""
        if not hasattr(self._worker, "last"):
            _wake_on_time()
        left_s = end_s - time.perf_counter()
        if left_s > SPIN_S:
            time.sleep(left_s - SPIN_S)
        while (now_s := time.perf_counter()) < end_s:
            time.sleep(0)
        self._worker.last = (end_s, now_s)


def _wake_on_time() -> None:
    """Ask the kernel for exact timers on this thread; elsewhere than on Linux nothing changes."""
    if sys.platform == "linux":
        pr_set_timerslack = 29
        ctypes.CDLL(None).prctl(pr_set_timerslack, TIMER_SLACK_NS, 0, 0, 0)
