"""`Prefetcher`: while a request waits for admission, its chunks move up to a faster tier.

The runtime alone knows it: no op and no knob of the plan stands for it, so what it did is counted
instead, and the simulator does not show its gain. Use it for serving, not for what is compared.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..core.chunk_index import ChunkEntry, ChunkIndex
from ..core.errors import CacheTuneError
from ..core.workload import Request
from .chunk_store import ChunkStore

log = logging.getLogger(__name__)


@dataclass
class PrefetchCounters:
    """Chunks asked for, moved in time to be found there, and what could not be moved."""

    asked: int = 0
    moved: int = 0
    moved_bytes: int = 0
    failed: int = 0


class LiveIndex(ChunkIndex):
    """An index that learns of moves made by other threads, at its next lookup."""

    def __init__(self) -> None:
        super().__init__()
        self._moved: deque[tuple[str, str, str]] = deque()

    def move(self, key: str, tier: str, tenant: str) -> None:
        """A chunk is served from `tier` from now on. Any thread."""
        self._moved.append((key, tier, tenant))

    def lookup(self, content_ids: Iterable[str], tenant: str = "") -> list[ChunkEntry | None]:
        """See `ChunkIndex.lookup`."""
        while self._moved:
            key, tier, owner = self._moved.popleft()
            found = self.entry(key)
            if found is not None:  # else forgotten meanwhile
                self.add(replace(found, tier=tier), owner)
        return super().lookup(content_ids, tenant)


class Prefetcher:
    """Moves chunks of waiting requests into `tier`, one at a time, oldest request first."""

    def __init__(self, store: ChunkStore, index: LiveIndex, tier: str) -> None:
        self.counters = PrefetchCounters()
        self._store = store
        self._index = index
        self._tier = tier
        self._queue: deque[tuple[ChunkEntry, str]] = deque()
        self._asked: set[str] = set()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()

    def on_wait(self, request: Request) -> None:
        """A request was not admitted at once."""
        for entry in self._index.lookup(request.chunks, request.tenant):
            if entry is None or entry.tier == self._tier or entry.key in self._asked:
                continue
            self._asked.add(entry.key)
            with self._changed:
                self.counters.asked += 1
                self._queue.append((entry, request.tenant))
                self._changed.notify()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop what has not begun, end the worker."""
        with self._changed:
            self._closing = True
            self._queue.clear()
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._closing:
                    self._changed.wait()
                if self._closing:
                    return
                entry, tenant = self._queue.popleft()
            try:
                self._store.place(entry.key, self._tier)
            except CacheTuneError:
                self.counters.failed += 1
                continue
            except Exception:  # the thread goes on, as that of write-back does
                log.exception("a chunk was not moved up")
                self.counters.failed += 1
                continue
            self.counters.moved += 1
            self.counters.moved_bytes += entry.n_bytes
            self._index.move(entry.key, self._tier, tenant)
