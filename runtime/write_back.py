"""`WriteBack`: chunks are stored behind the requests' back, by a worker, from a bounded queue.

What does not fit into the queue is dropped and counted: a cache may lose a write, not hold up an
answer. What is queued is not found by lookups until it is written.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ..core.errors import CacheTuneError, StoreError

log = logging.getLogger(__name__)

QUEUE_BYTES = 1 << 30


@dataclass
class WriteBackCounters:
    """What became of the writes asked for: queued = written + failed + what is still pending."""

    queued: int = 0
    written: int = 0
    failed: int = 0
    dropped: int = 0
    dropped_bytes: int = 0
    most_pending_bytes: int = 0


class WriteBack:
    """A queue of writes and the thread that does them, oldest first.

    Args:
        capacity_bytes: most bytes that may wait or be under way.

    Raises:
        StoreError: the capacity is not above 0.
    """

    def __init__(self, capacity_bytes: int = QUEUE_BYTES) -> None:
        if capacity_bytes <= 0:
            raise StoreError(
                "the write-back queue must hold some bytes",
                values=f"{capacity_bytes}",
                remedy="give it more, or write at once",
            )
        self.counters = WriteBackCounters()
        self._capacity = capacity_bytes
        self._queue: deque[tuple[Callable[[], object], int]] = deque()
        self._pending_bytes = 0
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="write-back", daemon=True)
        self._thread.start()

    @property
    def pending_bytes(self) -> int:
        """Bytes that wait or are under way."""
        return self._pending_bytes

    def add(self, write: Callable[[], object], n_bytes: int) -> bool:
        """Have `write` called soon, holding `n_bytes` until then; False when it was dropped."""
        with self._changed:
            counters = self.counters
            if self._closing or self._pending_bytes + n_bytes > self._capacity:
                counters.dropped += 1
                counters.dropped_bytes += n_bytes
                return False
            self._pending_bytes += n_bytes
            counters.queued += 1
            counters.most_pending_bytes = max(counters.most_pending_bytes, self._pending_bytes)
            self._queue.append((write, n_bytes))
            self._changed.notify_all()
        return True

    def flush(self) -> None:
        """Wait until everything that was queued is written or has failed."""
        with self._changed:
            while self._pending_bytes or self._queue:
                self._changed.wait()

    def close(self) -> None:
        """Flush, then end the worker."""
        self.flush()
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._closing:
                    self._changed.wait()
                if not self._queue:
                    return
                write, n_bytes = self._queue.popleft()
            written = False
            try:
                write()
                written = True
            except CacheTuneError as e:
                log.warning("a chunk was not kept: %s", e)
            except Exception:
                log.exception("a chunk was not kept")
            del write  # what it holds is free before its bytes are given back
            with self._changed:
                self.counters.written += written
                self.counters.failed += not written
                self._pending_bytes -= n_bytes
                self._changed.notify_all()
