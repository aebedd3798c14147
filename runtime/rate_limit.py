"""A limiter that makes a fast medium act as a slower link, so that such a tier can be tested.

The link is a queue in virtual time: each request takes the next free slot, of latency plus bytes
over rate, and its worker sleeps to the slot's end. Slots never overlap, so the sum over all
workers cannot exceed the rate, and an oversleep of one worker is not lost to the others.
"""

from __future__ import annotations

import threading
import time

SPIN_S = 150e-6
"""The end of a wait is spun: sleeping is late by about 60 us on an idle machine."""

QUEUE_GAP_S = 200e-6
"""A pause shorter than this does not idle the link: it is our Python between two requests."""


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

    def reserve(self, n_bytes: int, asked_s: float | None = None) -> float:
        """Take the next slot for `n_bytes`; returns its end on `time.perf_counter`.

        `asked_s`: when the request was due, if that is earlier than now. A worker that reads on
        passes the end of its last slot, so waking late does not open a gap on the link.
        """
        with self._lock:
            if asked_s is None:
                now = time.perf_counter()
                asked_s = self._free_s if now - self._free_s < QUEUE_GAP_S else now
            self._free_s = max(self._free_s, asked_s) + self._latency_s + n_bytes * self._s_per_byte
            return self._free_s

    @staticmethod
    def wait(end_s: float) -> None:
        """Sleep until `end_s`, off the interpreter lock."""
        left = end_s - time.perf_counter()
        if left > SPIN_S:
            time.sleep(left - SPIN_S)
        while time.perf_counter() < end_s:
            time.sleep(0)
