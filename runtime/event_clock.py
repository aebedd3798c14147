"""`EventClock`: marks of a device as nanoseconds of the host's clock.

A device tells only the time between two marks, in fp32 milliseconds: exact to 60 ns over a second,
to 60 us over a quarter of an hour. So the anchor moves along with the marks, each step short.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from .device import Device

N_READINGS = 8
REBASE_NS = 1e9


class EventClock:
    """One device's marks. The first anchor waits for an idle stream, once."""

    def __init__(self, device: Device) -> None:
        self._lock = threading.Lock()
        self.error_ns = 0
        """Half the time in which the first anchor's reading was taken: how far off it may be."""
        self.n_ahead = 0
        """Marks that seemed to lie in the future; the anchor was set back."""
        stream = device.stream("clock")
        device.host_waits["clock"] += N_READINGS
        best: tuple[int, int, Any] | None = None
        for _ in range(N_READINGS):
            before = time.perf_counter_ns()
            mark = stream.mark()
            mark.wait()
            width = time.perf_counter_ns() - before
            if best is None or width < best[0]:
                best = width, before + width // 2, mark
        assert best is not None
        stream.close()
        self.error_ns = best[0] // 2
        self._at_ns, self._anchor = best[1], best[2]

    def ns(self, mark: Any) -> int:
        """Host nanoseconds at which a mark that is done was reached; never in the future."""
        with self._lock:
            since: float = mark.ns_since(self._anchor)
            at = self._at_ns + round(since)
            now = time.perf_counter_ns()
            if at > now:
                self.n_ahead += 1
                self._at_ns -= at - now
                at = now
            if since > REBASE_NS:
                self._at_ns, self._anchor = at, mark
            return at
